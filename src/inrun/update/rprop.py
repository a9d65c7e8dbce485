"""Rprop: the gradient's sign times a step size, which grows while the sign stays and shrinks as it turns."""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register_update
from inrun.update.parts import before


@register_update(torch.optim.Rprop)
class RpropUpdate(Update):
    """torch.optim.Rprop with maximize; single, foreach and capturable alike.

    The whole move is a jump at s = 0: of several pieces of the path the first one holds it all.
    """

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        group, size = moved.group, moved.state.get("step_size")
        (shrink, grow), (smallest, largest) = group["etas"], group["step_sizes"]
        if size is None:
            size = torch.full_like(moved.weight, float(group["lr"]))
        g = moved.gradient * (-s if group["maximize"] else s)
        turn = g * before(moved, "prev")
        factor = torch.ones_like(turn).masked_fill_(turn > 0, grow).masked_fill_(turn < 0, shrink)
        size = (size * factor).clamp_(smallest, largest)
        return g.sign_().masked_fill_(turn < 0, 0.0).mul_(size).neg_()
