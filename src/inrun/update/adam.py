"""Adam and AdamW: a move that bends, since the gradient stands in both moments.

With g(s) = sG (and the coupled decay), m(s) = beta1 m + (1 - beta1) g(s), v(s) = beta2 v + (1 - beta2) g(s)^2,
r(s) = sqrt(v(s) / bias2) the root and R(s) = r(s) + eps, the move is D(s) = -(lr / bias1) m(s) / R(s), and

    (D(b) - D(a)) / G = -(lr / bias1) [ (m(b) - m(a)) / G  -  m(a) / R(a) * (R(b) - R(a)) / G ] / R(b)

in which both differences have the factor G in closed form, so that nothing cancels where G is small:
(m(b) - m(a)) / G = (1 - beta1)(b - a) and (v(b) - v(a)) / G = (1 - beta2)(b - a)(g(a) + g(b)).
"""

import torch
from torch import Tensor

from inrun.update.base import Moved, Update, register


@register(torch.optim.Adam, torch.optim.AdamW)
class AdamUpdate(Update):
    """torch.optim.Adam and AdamW with amsgrad, coupled or decoupled decay, maximize; fused and foreach "
    "alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        step = _Step(moved, decay)
        move = step.mean(s).div_(step.root(s).add_(step.eps)).mul_(-step.rate)
        if decay and step.decoupled:
            move = move.add_(moved.weight, alpha=-step.lr * step.weight_decay)
        return move

    def chord(self, moved: Moved, a: float, b: float) -> Tensor:
        step = _Step(moved, decay=True)
        turn = step.mean(a).div_(step.root(a).add_(step.eps)).mul_(step.root_slope(a, b))
        chord = (step.mean_slope(a, b) - turn).mul_(step.rate).div_(step.root(b).add_(step.eps))
        return chord.masked_fill_(moved.gradient == 0, 0.0)


class _Step:
    """The quantities of the module's docstring at one step of one parameter."""

    def __init__(self, moved: Moved, decay: bool) -> None:
        group, state = moved.group, moved.state
        self.beta1, self.beta2 = (float(beta) for beta in group["betas"])
        self.lr, self.eps, self.weight_decay = float(group["lr"]), group["eps"], group["weight_decay"]
        self.decoupled = bool(group["decoupled_weight_decay"]) and self.weight_decay != 0
        t = float(state["step"]) + 1 if "step" in state else 1.0
        self.rate = self.lr / (1 - self.beta1**t)
        self.bias2 = 1 - self.beta2**t
        self.sign = -1.0 if group["maximize"] else 1.0
        self.gradient = moved.gradient * self.sign
        coupled = decay and self.weight_decay != 0 and not self.decoupled
        self.pull = self.weight_decay * moved.weight if coupled else torch.zeros_like(moved.weight)
        zero = torch.zeros_like(moved.weight)
        self.old_mean, self.old_square = state.get("exp_avg", zero), state.get("exp_avg_sq", zero)
        self.floor: Tensor | None = state.get("max_exp_avg_sq", zero) if group["amsgrad"] else None

    def at(self, s: float) -> Tensor:
        """g(s): what the moments take in."""
        return torch.add(self.pull, self.gradient, alpha=s)

    def mean(self, s: float) -> Tensor:
        return torch.lerp(self.old_mean, self.at(s), 1 - self.beta1)

    def square(self, s: float) -> Tensor:
        g = self.at(s)
        return torch.addcmul(self.beta2 * self.old_square, g, g, value=1 - self.beta2)

    def root(self, s: float) -> Tensor:
        square = self.square(s)
        if self.floor is not None:
            square = torch.maximum(self.floor, square)
        return square.div_(self.bias2).sqrt_()

    def mean_slope(self, a: float, b: float) -> float:
        """(m(b) - m(a)) / G."""
        return self.sign * (1 - self.beta1) * (b - a)

    def root_slope(self, a: float, b: float) -> Tensor:
        """(r(b) - r(a)) / G = (v(b) - v(a)) / G / bias2 / (r(a) + r(b)), under amsgrad with max(floor, v) "
        "for v."""
        slope = (self.at(a) + self.at(b)).mul_(self.sign * (1 - self.beta2) * (b - a))
        if self.floor is not None:
            low, high = self.square(a), self.square(b)
            # a part of the piece may lie under the floor, where the maximum stands still
            risen = (torch.maximum(high, self.floor) - torch.maximum(low, self.floor)) / (high - low)
            above = (low >= self.floor) & (high >= self.floor)
            slope.mul_(torch.where(above, 1.0, risen.nan_to_num(0.0).clamp_(0, 1)))
        roots = self.root(a) + self.root(b)
        return torch.where(roots > 0, slope / (roots * self.bias2), 0.0)
