"""Adadelta: the gradient times the root mean square of past moves over that of the gradients."""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register_update
from inrun.update.parts import before, mean_square, received


@register_update(torch.optim.Adadelta)
class AdadeltaUpdate(Update):
    """torch.optim.Adadelta with weight decay and maximize; single, foreach and capturable alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        group = moved.group
        g = received(moved, s, decay)
        gradients = mean_square(before(moved, "square_avg"), g, group["rho"]).add_(group["eps"]).sqrt_()
        moves = (before(moved, "acc_delta") + group["eps"]).sqrt_()
        return g.mul_(moves).div_(gradients).mul_(-float(group["lr"]))
