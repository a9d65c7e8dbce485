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

_UNIFORM = 1e-3  # how far the factors of one scaling may differ by rounding, or as much as four roundings do


class Received:
    """A copy of the gradient at the end of the last batch, against which what was done to it since is seen.

    The values are compared, not their versions: what is written through `.data`, or by a fused kernel, leaves none.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._names = names
        self.raw: dict[nn.Parameter, Tensor] = {}

    def keep(self) -> None:
        """Take the copy."""
        for p in self._names:
            if p.grad is None:
                self.raw.pop(p, None)
            elif p.grad.is_sparse:
                raise InrunError(f"{self._names[p]}: sparse gradients are not supported: build it with sparse=False.")
            elif p in self.raw:
                self.raw[p].copy_(p.grad)
            else:
                self.raw[p] = p.grad.detach().clone()

    def check_untouched(self) -> None:
        """Raise InrunError if a gradient changed since the copy: accumulation must go on from where it was."""
        changed = [name for p, name in self._names.items() if not _same(p.grad, self.raw.get(p))]
        if changed:
            raise InrunError(
                "a `batch` had no optimizer.step(), and the gradients changed before the next one "
                f"({', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''}). If they were dropped on purpose "
                "(zero_grad without a step, or a step that a gradient scaler left out), call attributor.discard(); a "
                "backward pass outside of a `batch` block belongs inside of one."
            )

    def scales(self, moves: Mapping[nn.Parameter, Moved]) -> dict[nn.Parameter, Tensor] | None:
        """Received gradient / made gradient by parameter and coordinate; None if nothing was changed.

        Raises InrunError if it was changed by more than a scaling: one factor for all (clipping by norm, unscaling), or
        factors from 0 to 1 (clipping by value).
        """
        if all(_same(moves[p].gradient if p in moves else None, self.raw.get(p)) for p in self._names):
            return None
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


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return torch.equal(x, y) or (x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()))
