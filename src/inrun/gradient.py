"""The gradient that the optimizer receives, against the one that backward made.

Between the two, a loop may clip or unscale. Example i's contribution follows: g_i is scaled, coordinate by coordinate,
as the whole gradient was, so that sum_i g_i = G stays true of the gradient that the optimizer really receives.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.update import Moved

_PART = 2**17  # entries looked at together: they fit a processor's cache
_UNIFORM = 1e-3  # how far the factors of one scaling may differ by rounding, or as much as four roundings do


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which numbers of this one are multiplied and added up: float32 at least."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def square(x: Tensor, copy: Tensor | None = None) -> Tensor:
    """<x, x> in float64, in parts that fit a processor's cache; each is written to `copy` on the way."""
    parts = torch.split(x.reshape(-1), _PART)
    if copy is not None:
        for part, there in zip(parts, torch.split(copy.view(-1), _PART), strict=True):
            there.copy_(part)
    return torch.stack([_dot(part, part) for part in parts]).sum(dtype=torch.float64)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y>, of which float16 may have no number."""
    return torch.dot(x.to(wide(x.dtype)), y.to(wide(y.dtype)))


class Received:
    """A copy of the gradient at the end of the last batch, against which what was done to it since is seen.

    The values are compared, not their versions: what is written through `.data`, or by a fused kernel, leaves none.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._names = names
        self.raw: dict[nn.Parameter, Tensor] = {}
        self.squares: dict[nn.Parameter, Tensor] = {}
        self._changed = False

    def keep(self) -> None:
        """Take the copy."""
        for p in self._names:
            if p.grad is None:
                self.raw.pop(p, None)
                self.squares.pop(p, None)
            elif p.grad.is_sparse:
                raise InrunError(f"{self._names[p]}: sparse gradients are not supported: build it with sparse=False.")
            else:
                if p not in self.raw:
                    self.raw[p] = torch.empty_like(p, memory_format=torch.contiguous_format)
                self.squares[p] = square(p.grad.detach(), self.raw[p])

    def left_out(self) -> bool:
        """Whether there was no step since the copy because a gradient was not finite, as a gradient scaler does it.

        Raises InrunError if gradients changed otherwise: accumulation must go on from where it was.
        """
        changed = {name: self.raw.get(p) for p, name in self._names.items() if not _same(p.grad, self.raw.get(p))}
        if any(raw is not None and not bool(raw.isfinite().all()) for raw in changed.values()):
            return True
        if changed:
            some = ", ".join(list(changed)[:4]) + (", ..." if len(changed) > 4 else "")
            raise InrunError(
                "a `batch` had no optimizer.step(), and the gradients changed before the next one "
                f"({some}). If they were dropped on purpose "
                "(zero_grad without a step, or a step that a gradient scaler left out), call attributor.discard(); a "
                "backward pass outside of a `batch` block belongs inside of one."
            )
        return False

    def receive(self, moves: Mapping[nn.Parameter, Moved]) -> dict[nn.Parameter, Tensor]:
        """The squared norms of the gradients that the optimizers receive, by parameter."""
        self._changed = not all(_same(moves[p].gradient if p in moves else None, self.raw.get(p)) for p in self._names)
        return {p: square(moved.gradient) for p, moved in moves.items()} if self._changed else dict(self.squares)

    def scales(self, moves: Mapping[nn.Parameter, Moved]) -> dict[nn.Parameter, Tensor] | None:
        """Received gradient / made gradient by parameter, one number where it is that; None if nothing was changed.

        To be called after `receive`. Raises InrunError if it was changed by more than a scaling: one factor for all
        (clipping by norm, unscaling), or factors from 0 to 1 (clipping by value).
        """
        if not self._changed:
            return None
        by_parameter = self._factors(moves)
        if by_parameter is not None:
            return by_parameter
        scales, names, lows, highs, from_nothing = {}, {}, [], [], []
        rounding = _UNIFORM
        for p in self._names:
            raw, received = self.raw.get(p), moves[p].gradient if p in moves else None
            raw = torch.zeros_like(p) if raw is None else raw
            received = torch.zeros_like(p) if received is None else received
            made = raw != 0
            scales[p] = factors = received / raw
            if not p.numel():
                continue
            # a quotient of denormal numbers says nothing about the factor
            exact = raw.abs() > torch.finfo(raw.dtype).tiny / torch.finfo(raw.dtype).eps
            names[p] = self._names[p]
            lows.append(factors.masked_fill(~exact, math.inf).amin().double())
            highs.append(factors.masked_fill(~exact, -math.inf).amax().double())
            rounding = max(rounding, 4 * torch.finfo(raw.dtype).eps)
            from_nothing.append((received.masked_fill(made, 0) != 0).any())
        low, high = torch.stack(lows).tolist(), torch.stack(highs).tolist()
        least, most = min(low), max(high)
        uniform = most - least <= rounding * abs(most)
        news = torch.stack(from_nothing).tolist()
        for name, new, smallest, largest in zip(names.values(), news, low, high, strict=True):
            if new or smallest < 0 or (largest > 1 + rounding and not uniform):
                raise InrunError(
                    f"{name}: between backward() and step() its gradient was changed by more than clipping or scaling, "
                    "so it no longer is the sum of the examples' contributions (noise was added, or a backward pass "
                    "ran outside of the `batch` block). Add such terms inside the loss, or in the optimizer."
                )
        for p, factor in zip(names, high, strict=True):
            # where the examples cancel there is no quotient: what was done to the rest was done to them
            known = [one for one in (factor, most) if math.isfinite(one)] or [1.0]
            scales[p].nan_to_num_(known[0], math.inf, -math.inf)
        return scales

    def _factors(self, moves: Mapping[nn.Parameter, Moved]) -> dict[nn.Parameter, Tensor] | None:
        """One factor by parameter, as clipping by norm and unscaling leave it; None if it is not that simple."""
        found: dict[nn.Parameter, float] = {}
        silent, away = [], []
        for p in self._names:
            raw, received = self.raw.get(p), moves[p].gradient if p in moves else None
            if raw is None and received is None:
                continue
            if raw is None:
                return None
            if received is None:
                away.append(p)
                continue
            factor = _factor(raw, received)
            if factor is None:
                return None
            if math.isnan(factor):
                silent.append(p)
            else:
                found[p] = factor
        most, least = max(found.values(), default=1.0), min(found.values(), default=1.0)
        if not least >= 0 or (most > 1 + _UNIFORM and most - least > _UNIFORM * most):
            return None
        found |= dict.fromkeys(silent, most) | dict.fromkeys(away, 0.0)
        return {p: torch.tensor(factor, dtype=torch.float64, device=p.device) for p, factor in found.items()}


def _factor(raw: Tensor, received: Tensor) -> float | None:
    """The number that makes one tensor the other, to rounding; NaN if both are zero, None if there is none."""
    if raw.shape != received.shape or not raw.is_contiguous() or not received.is_contiguous():
        return None
    parts = list(zip(torch.split(raw.view(-1), _PART), torch.split(received.view(-1), _PART), strict=True))
    squares = float(sum(_dot(x, x).double() for x, _ in parts))
    products = float(sum(_dot(x, y).double() for x, y in parts))
    if squares == 0 or not math.isfinite(squares) or not math.isfinite(products):
        return math.nan if squares == 0 and not bool(raw.any()) and not bool(received.any()) else None
    factor = products / squares
    left = math.hypot(*(float(torch.sub(y, x, alpha=factor).norm(dtype=wide(x.dtype))) for x, y in parts))
    return factor if left <= 16 * torch.finfo(raw.dtype).eps * abs(factor) * math.sqrt(squares) else None


def _in_words(x: Tensor) -> bool:
    """Whether it can be looked at as numbers of eight bytes."""
    return x.is_contiguous() and x.nbytes % 8 == 0 and x.storage_offset() * x.element_size() % 8 == 0


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    if x.dtype == y.dtype and x.shape == y.shape and _in_words(x) and _in_words(y):
        words = x.view(-1).view(torch.int64), y.view(-1).view(torch.int64)  # compared in half the time
        if torch.equal(*words):
            return True
    return torch.equal(x, y) or (x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()))
