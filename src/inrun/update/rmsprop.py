"""RMSprop: the gradient over its root mean square or, centered, over its standard deviation."""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register_update
from inrun.update.parts import before, mean_square, received


@register_update(torch.optim.RMSprop)
class RMSpropUpdate(Update):
    """torch.optim.RMSprop, centered or not, momentum, weight decay, maximize; single, foreach, capturable alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        group = moved.group
        g = received(moved, s, decay)
        square = mean_square(before(moved, "square_avg"), g, group["alpha"])
        if group["centered"]:
            mean = torch.lerp(before(moved, "grad_avg"), g, 1 - group["alpha"])
            # a constant gradient's variance is a difference of rounding errors, of either sign
            square = square.addcmul_(mean, mean, value=-1).clamp_(min=0)
        move = g.div_(square.sqrt_().add_(group["eps"]))
        if group["momentum"] > 0:
            move = move.add_(before(moved, "momentum_buffer"), alpha=group["momentum"])
        return move.mul_(-float(group["lr"]))
