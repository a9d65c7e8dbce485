"""Adam and AdamW: a move that bends, since the gradient stands in both moments.

With g(s) = sG (and the coupled decay), m(s) = beta1 m + (1 - beta1) g(s), v(s) = beta2 v + (1 - beta2) g(s)^2,
r(s) = sqrt(v(s) / bias2) the root and R(s) = r(s) + eps, the move is D(s) = -(lr / bias1) m(s) / R(s), and

    (D(b) - D(a)) / G = -(lr / bias1) [ (m(b) - m(a)) / G  -  m(a) / R(a) * (R(b) - R(a)) / G ] / R(b)

in which both differences have the factor G in closed form, so that nothing cancels where G is small:
(m(b) - m(a)) / G = (1 - beta1)(b - a) and (v(b) - v(a)) / G = (1 - beta2)(b - a)(g(a) + g(b)).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inrun.update.base import Back, Mix, Moved, Update, register_update


@register_update(torch.optim.Adam, torch.optim.AdamW)
class AdamUpdate(Update):
    """torch.optim.Adam and AdamW with amsgrad, coupled or decoupled decay, maximize; fused and foreach alike."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        step = _Step(moved, decay)
        g = step.gradient(s)
        move = step.mean(g).div_(step.root(step.square(g)).add_(step.eps)).mul_(-step.rate)
        if decay and step.decoupled:
            move.add_(moved.weight, alpha=-step.lr * step.weight_decay)
        return move

    def chord(self, moved: Moved, a: float, b: float) -> Tensor:
        step = _Step(moved, decay=True)
        g_a, g_b = step.gradient(a), step.gradient(b)
        v_a, v_b = step.square(g_a), step.square(g_b)
        r_a, r_b = step.root(v_a), step.root(v_b)
        # (r(b) - r(a)) / G, but for a number. Where both roots are zero: the squares underflowed and neither moves; or,
        # if G = 0, it is NaN, and the chord is the quotient's limit, which a coordinate without a past does not have
        turn = torch.add(g_a, g_b).div_(r_a + r_b).nan_to_num_(math.nan, 0.0, 0.0)
        if step.floor is not None:
            turn.mul_(_share_above(step.floor, v_a, v_b))
        turn.mul_(step.mean(g_a)).div_(r_a.add_(step.eps))
        turn.mul_(-step.rate * step.sign * (1 - step.beta2) * (b - a) / step.bias2)
        chord = turn.add_(step.rate * step.sign * (1 - step.beta1) * (b - a)).div_(r_b.add_(step.eps))
        return chord.nan_to_num_(0.0, math.inf, -math.inf)

    def place(
        self, moved: Moved, a: float, b: float, x: float, chord: Tensor, weight: Tensor, work: Sequence[Tensor]
    ) -> None:
        step, G, m, v = (
            _Step(moved, decay=True),
            moved.gradient,
            moved.state.get("exp_avg"),
            moved.state.get("exp_avg_sq"),
        )
        if (
            a != 0
            or m is None
            or v is None
            or step.floor is not None
            or step.pull is not None
            or weight.element_size() < 4
        ):
            super().place(moved, a, b, x, chord, weight, work)
            return
        # `chord` and `displacement` with what they share computed once, all factors in one place, and no new memory
        r_a, r_b, way, _ = work
        torch.mul(v, step.beta2 / step.bias2, out=r_a)
        torch.addcmul(r_a, G, G, value=b * b * (1 - step.beta2) / step.bias2, out=r_b)
        torch.add(r_a.sqrt_(), r_b.sqrt_(), out=way)
        torch.div(G, way, out=chord).nan_to_num_(math.nan, 0.0, 0.0)
        torch.div(m, r_a.add_(step.eps), out=way)
        turn = step.rate * step.beta1 * (1 - step.beta2) * b * b / step.bias2
        chord.mul_(way).mul_(-turn).add_(step.rate * step.sign * (1 - step.beta1) * b)
        chord.div_(r_b.add_(step.eps)).nan_to_num_(0.0, math.inf, -math.inf)
        if step.decoupled:
            weight.mul_(1 - step.lr * step.weight_decay)
        weight.add_(way, alpha=-step.rate * step.beta1).addcmul_(chord, G, value=-x)

    def mix(self, moved: Moved) -> Mix:
        step = _Step(moved, decay=True)
        root = step.root(step.square(step.gradient(1.0)))
        return Mix(
            scale=step.rate / root.add_(step.eps),
            keep=step.beta1,
            take=1 - step.beta1,
            through=1.0,
            direct=0.0,
            sign=step.sign,
            before=moved.state.get("exp_avg"),
            decay=step.pull,
            pull=step.lr * step.weight_decay * moved.weight if step.decoupled else None,
        )

    def back(self, moved: Moved, weight: Tensor, state: Mapping[str, Tensor]) -> Back:
        step = _Step(moved, decay=True)
        g = step.gradient(1.0)
        m, v = step.mean(g), step.square(g)
        root = step.root(v)
        # where v is zero after the step no gradient ever came: the root has no derivative there, and nothing to move
        none = root == 0
        bottom = root + step.eps
        by_mean = bottom.reciprocal().mul_(-step.rate).masked_fill_(none, 0.0)
        by_square = m.mul_(by_mean).div_(bottom.mul_(root)).mul_(-0.5 / step.bias2).masked_fill_(none, 0.0)
        mean, square = weight * by_mean, weight * by_square
        if "exp_avg" in state:
            mean.add_(state["exp_avg"])
        before = {}
        if step.floor is not None:
            highest, above = square, v >= step.floor
            if "max_exp_avg_sq" in state:
                highest = highest + state["max_exp_avg_sq"]
            square = highest.masked_fill(~above, 0.0)
            before["max_exp_avg_sq"] = highest.masked_fill(above, 0.0)
        if "exp_avg_sq" in state:
            square.add_(state["exp_avg_sq"])
        gradient = torch.mul(mean, 1 - step.beta1).addcmul_(g, square, value=2 * (1 - step.beta2))
        gradient.masked_fill_(none, 0.0)
        before["exp_avg"], before["exp_avg_sq"] = mean.mul_(step.beta1), square.mul_(step.beta2)
        if step.weight_decay != 0:
            fixed = (1 - step.lr * step.weight_decay) * weight
            weight = fixed if step.decoupled else weight + step.weight_decay * gradient
        return step.sign * gradient, weight, before


def _share_above(floor: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Which part of the way from `low` to `high` lies above the floor, below which amsgrad's maximum stands still."""
    risen = (torch.maximum(high, floor) - torch.maximum(low, floor)) / (high - low)
    return torch.where((low >= floor) & (high >= floor), 1.0, risen.nan_to_num(0.0).clamp_(0, 1))


class _Step:
    """The quantities of the module's docstring at one step of one parameter. Every method returns a new tensor."""

    def __init__(self, moved: Moved, decay: bool) -> None:
        group, state = moved.group, moved.state
        self.beta1, self.beta2 = (float(beta) for beta in group["betas"])
        self.lr, self.eps, self.weight_decay = float(group["lr"]), group["eps"], group["weight_decay"]
        self.decoupled = bool(group["decoupled_weight_decay"]) and self.weight_decay != 0
        t = float(state["step"]) + 1 if "step" in state else 1.0
        self.rate = self.lr / (1 - self.beta1**t)
        self.bias2 = 1 - self.beta2**t
        self.sign = -1.0 if group["maximize"] else 1.0
        coupled = decay and self.weight_decay != 0 and not self.decoupled
        self._moved, self.pull = moved, self.weight_decay * moved.weight if coupled else None
        self._mean, self._square = state.get("exp_avg"), state.get("exp_avg_sq")
        self.floor: Tensor | None = None
        if group["amsgrad"]:
            self.floor = state["max_exp_avg_sq"] if "max_exp_avg_sq" in state else torch.zeros_like(moved.weight)

    def gradient(self, s: float) -> Tensor:
        """g(s): what the moments take in."""
        g = self._moved.gradient * (s * self.sign)
        return g if self.pull is None else g.add_(self.pull)

    def mean(self, g: Tensor) -> Tensor:
        """m(s), of g(s)."""
        return g * (1 - self.beta1) if self._mean is None else torch.lerp(self._mean, g, 1 - self.beta1)

    def square(self, g: Tensor) -> Tensor:
        """v(s), of g(s)."""
        v = g.square().mul_(1 - self.beta2)
        return v if self._square is None else v.add_(self._square, alpha=self.beta2)

    def root(self, v: Tensor) -> Tensor:
        """r(s), of v(s)."""
        v = v / self.bias2 if self.floor is None else torch.maximum(self.floor, v).div_(self.bias2)
        return v.sqrt_()
