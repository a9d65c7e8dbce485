"""NAdam: Adam with Nesterov's momentum, whose gradient stands in the move once more by itself."""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register_update
from inrun.update.parts import before, decayed, mean_square, received, single, steps


@register_update(torch.optim.NAdam)
class NAdamUpdate(Update):
    """torch.optim.NAdam with coupled or decoupled decay and maximize; single, foreach and capturable alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        group, t = moved.group, steps(moved)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        g = received(moved, s, decay)
        mean = torch.lerp(before(moved, "exp_avg"), g, 1 - beta1)
        square = mean_square(before(moved, "exp_avg_sq"), g, beta2)
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (t, t + 1))
        product = float(single(moved, "mu_product", 1.0) * mu)  # rounded as torch keeps it
        move = g * ((1 - mu) / (1 - product)) + mean * (mu_next / (1 - product * mu_next))
        move = move.div_((square / (1 - beta2**t)).sqrt_().add_(group["eps"])).mul_(-float(group["lr"]))
        return decayed(move, moved, decay)
