"""RAdam: plain momentum as long as the second moment rests on too few steps, then Adam with a rectified rate."""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register_update
from inrun.update.parts import before, decayed, mean_square, received, steps


@register_update(torch.optim.RAdam)
class RAdamUpdate(Update):
    """torch.optim.RAdam with coupled or decoupled decay and maximize; single, foreach and capturable alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        group, t = moved.group, steps(moved)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        g = received(moved, s, decay)
        move = torch.lerp(before(moved, "exp_avg"), g, 1 - beta1).mul_(-float(group["lr"]) / (1 - beta1**t))
        bias2 = 1 - beta2**t
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / bias2
        if length > 5:
            rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            square = mean_square(before(moved, "exp_avg_sq"), g, beta2)
            move = move.mul_((rectified * bias2) ** 0.5).div_(square.sqrt_().add_(group["eps"]))
        return decayed(move, moved, decay)
