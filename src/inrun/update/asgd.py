"""ASGD: plain descent at a falling rate. The values are about these weights, not the average kept beside them."""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register_update
from inrun.update.parts import received, single


@register_update(torch.optim.ASGD)
class ASGDUpdate(Update):
    """torch.optim.ASGD with its decay term `lambd`, weight decay and maximize; single, foreach and capturable alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        g = received(moved, s, decay)
        if decay:
            g = g.add_(moved.weight, alpha=moved.group["lambd"])
        return g.mul_(-_rate(moved))

    def chord(self, moved: Moved, a: float, b: float) -> Tensor:
        rate = _rate(moved) * (b - a)
        return torch.full_like(moved.gradient, -rate if moved.group["maximize"] else rate)


def _rate(moved: Moved) -> float:
    """The step's rate, which torch rounds to the precision of its state."""
    return float(single(moved, "eta", float(moved.group["lr"])))
