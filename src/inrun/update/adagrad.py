"""Adagrad: the gradient over the root of the sum of all squares, this step's among them."""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register_update
from inrun.update.parts import received, steps


@register_update(torch.optim.Adagrad)
class AdagradUpdate(Update):
    """torch.optim.Adagrad with its decaying rate, weight decay and maximize; single, foreach and fused alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        group, g = moved.group, received(moved, s, decay)
        total = moved.state.get("sum")
        if total is None:  # of a parameter that was added later
            total = torch.full_like(moved.weight, group["initial_accumulator_value"])
        rate = float(group["lr"]) / (1 + (steps(moved) - 1) * group["lr_decay"])
        root = torch.addcmul(total, g, g).sqrt_().add_(group["eps"])
        return g.mul_(-rate).div_(root)
