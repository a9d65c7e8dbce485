"""Adamax: Adam with the largest recent gradient in the place of the root mean square."""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register_update
from inrun.update.parts import before, received, steps


@register_update(torch.optim.Adamax)
class AdamaxUpdate(Update):
    """torch.optim.Adamax with weight decay and maximize; single, foreach and capturable alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        group = moved.group
        beta1, beta2 = (float(beta) for beta in group["betas"])
        g = received(moved, s, decay)
        rate = float(group["lr"]) / (1 - beta1 ** steps(moved))
        mean = torch.lerp(before(moved, "exp_avg"), g, 1 - beta1)
        return mean.mul_(-rate).div_(torch.maximum(before(moved, "exp_inf") * beta2, g.abs_().add_(group["eps"])))
