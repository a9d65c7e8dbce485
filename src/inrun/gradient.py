"""The gradient that the optimizer receives, against the one that backward made.

Between the two, a loop may clip or unscale. Example i's contribution follows: g_i is scaled, coordinate by coordinate,
as the whole gradient was, so that sum_i g_i = G stays true of the gradient that the optimizer really receives.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.parallel import gradient_of, local
from inrun.update import Moved

_PART = 2**17  # entries looked at together: they fit a processor's cache
_SOME = 64  # numbers of every tensor by which it is known
_AGAIN = 64  # roundings of the examples' gradients by which a sum of them made again may differ
_UNIFORM = 1e-3  # how far the factors of one scaling may differ by rounding, or as much as four roundings do

# makes the gradient again from the examples' own: their sum, and the sum of their sizes, by parameter
Anew = Callable[[], tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor]]]
BY_VALUE = (
    "a gradient was clipped by value, while under scheme='first' with SGD every example's gradient is used as soon as "
    "it is formed, before that is known: give the Attributor kernel='tangent'."
)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which numbers of this one are multiplied and added up: float32 at least."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def square(x: Tensor) -> Tensor:
    """<x, x> in float64."""
    return _inner(x, x)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> in float64, of parts that fit a processor's cache, each in float32 at least."""
    parts = zip(torch.split(x.reshape(-1), _PART), torch.split(y.reshape(-1), _PART), strict=True)
    products = [torch.dot(a.to(wide(a.dtype)), b.to(wide(b.dtype))) for a, b in parts]
    return torch.stack(products).sum(dtype=torch.float64)


def sample(x: Tensor) -> Tensor:
    """Some of the tensor's numbers, by which a change of the whole is seen."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SOME)].clone()


class Received:
    """The gradient as the newest batch made it, and what was done to it since.

    A copy costs as much memory as the weights, and time to write and compare it. So it is taken at the first step, and
    from the first on at which something was done; between, a change is seen by the tensors' versions and some of their
    numbers. (What escapes these, written to few places past the versions, conservation meets: inrun.books.)
    """

    def __init__(self, names: Mapping[nn.Parameter, str], *, copying: bool = False) -> None:
        self._names, self._always = names, copying
        self.made: dict[nn.Parameter, Tensor] = {}  # the gradient as made, of those that have one; after `scales`
        self.squares: dict[nn.Parameter, Tensor] = {}  # of `made`
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._marks: dict[nn.Parameter, _Mark] = {}
        self._copying = True
        self._looked = self._touched = self._changed = False

    def keep(self) -> None:
        """Remember the gradients as they are."""
        self._copying = self._always or self._touched or not self._looked
        self._marks, self.squares = {}, {}
        if not self._copying:
            self._copies.clear()
        for p in self._names:
            gradient = gradient_of(p)
            if gradient is None:
                self._copies.pop(p, None)
            elif gradient.is_sparse:
                raise InrunError(f"{self._names[p]}: sparse gradients are not supported: build it with sparse=False.")
            else:
                self._marks[p] = _Mark(gradient)
                if self._copying:
                    if p not in self._copies:
                        self._copies[p] = torch.empty_like(gradient, memory_format=torch.contiguous_format)
                    self._copies[p].copy_(gradient)
                    self.squares[p] = square(self._copies[p])

    def _differ(self, now: Mapping[nn.Parameter, Tensor | None]) -> bool:
        """Whether these parameters' gradients are others than were kept."""
        if self._copying:
            return not same([(gradient, self._copies.get(p)) for p, gradient in now.items()])
        if not all(p not in self._marks if g is None else self._marks[p].is_at(g) for p, g in now.items()):
            return True
        return not same([(sample(g), self._marks[p].some) for p, g in now.items() if g is not None])

    def left_out(self, anywhere: Callable[[bool], bool] = bool) -> bool:
        """Whether there was no step since the batch because a gradient was not finite, as a gradient scaler does it.

        `anywhere`: whether it is so with any process that has a part of the gradient.

        Raises InrunError if gradients changed otherwise: accumulation must go on from where it was.
        """
        changed = {p: name for p, name in self._names.items() if self._differ({p: gradient_of(p)})}
        known = [self._copies[p] if self._copying else self._marks[p].some for p in changed if p in self._marks]
        if anywhere(not all(bool(gradient.isfinite().all()) for gradient in known)):
            return True
        if changed:
            some = ", ".join(list(changed.values())[:4]) + (", ..." if len(changed) > 4 else "")
            raise InrunError(
                "a `batch` had no optimizer.step(), and the gradients changed before the next one "
                f"({some}). If they were dropped on purpose "
                "(zero_grad without a step, or a step that a gradient scaler left out), call attributor.discard(); a "
                "backward pass outside of a `batch` block belongs inside of one."
            )
        return False

    def receive(self, moves: Mapping[nn.Parameter, Moved]) -> dict[nn.Parameter, Tensor]:
        """The squared norms of the gradients that the optimizers receive, by parameter."""
        now = {p: moves[p].gradient if p in moves else None for p in self._names}
        self._changed = self._differ(now)
        # clipping by norm writes to the gradients at every step, be it a factor of one
        moved = any(p in self._marks and not self._marks[p].is_at(gradient) for p, gradient in now.items())
        self._looked, self._touched = True, self._touched or self._changed or moved
        if self._copying and not self._changed:
            return dict(self.squares)
        found = {p: square(moved.gradient) for p, moved in moves.items()}
        if not self._copying:
            self.squares = found
        return found

    def take(self, moves: Mapping[nn.Parameter, Moved]) -> None:
        """The gradient that the optimizers receive is the one that was made."""
        self._changed = False
        self.made = {p: moved.gradient for p, moved in moves.items()}
        self.squares = {p: square(gradient) for p, gradient in self.made.items()}

    def norms(self, moves: Mapping[nn.Parameter, Moved]) -> tuple[float, float]:
        """Of the gradient as made, and as received. To be called after `scales`."""
        squares = [square(moved.gradient) for moved in moves.values()]
        made = [x for p, x in self.squares.items() if p in moves]
        return float(torch.stack(made).sum().sqrt()), float(torch.stack(squares).sum().sqrt())

    def scales(self, moves: Mapping[nn.Parameter, Moved], anew: Anew | None) -> dict[nn.Parameter, Tensor] | None:
        """Received gradient / made gradient by parameter, one number where it is that; None if nothing was changed.

        To be called after `receive`.

        Args:
            anew: makes the gradient again, if there is no copy; None: it cannot be made.

        Raises:
            InrunError: it was changed by more than a scaling: one factor for all (clipping by norm, unscaling), or
                factors from 0 to 1 (clipping by value).
        """
        received = {p: moved.gradient for p, moved in moves.items()}
        if not self._changed:
            self.made = received
            return None
        if self._copying:
            self.made = self._copies
            return self._uniform(self.made, received) or self._by_coordinate(received, {})
        if anew is None:
            some = {p: sample(gradient) for p, gradient in received.items()}
            scales = self._uniform({p: mark.some for p, mark in self._marks.items()}, some)
            if scales is None:
                raise InrunError(BY_VALUE)
            self.made = {p: gradient / scales[p] if scales[p] else gradient for p, gradient in received.items()}
        else:
            self.made, sizes = anew()
            scales = self._uniform(self.made, received, sizes) or self._by_coordinate(received, sizes)
        self.squares = {p: square(gradient) for p, gradient in self.made.items()}
        return scales

    def _by_coordinate(
        self, received: Mapping[nn.Parameter, Tensor], sizes: Mapping[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """A factor for every coordinate, as clipping by value leaves it. Raises InrunError if it is not from 0 to 1."""
        scales, names, lows, highs, from_nothing = {}, {}, [], [], []
        rounding, largest_size = _UNIFORM, max((float(x.max()) for x in sizes.values() if x.numel()), default=0.0)
        for p in self._names:
            raw, new = self.made.get(p), received.get(p)
            raw = torch.zeros_like(local(p)) if raw is None else raw
            new = torch.zeros_like(local(p)) if new is None else new
            made = raw != 0
            scales[p] = factors = new / raw
            if p in sizes:
                # what was made again is the same to its rounding: where rows cancel, that is all there is
                near = (new - raw).abs() <= _AGAIN * torch.finfo(raw.dtype).eps * largest_size
                factors.masked_fill_(near, 1.0)
                made |= near
            if not raw.numel():
                continue
            # a quotient of denormal numbers says nothing about the factor
            exact = raw.abs() > torch.finfo(raw.dtype).tiny / torch.finfo(raw.dtype).eps
            names[p] = self._names[p]
            lows.append(factors.masked_fill(~exact, math.inf).amin().double())
            highs.append(factors.masked_fill(~exact, -math.inf).amax().double())
            rounding = max(rounding, 4 * torch.finfo(raw.dtype).eps)
            from_nothing.append((new.masked_fill(made, 0) != 0).any())
        low, high = torch.stack(lows).tolist(), torch.stack(highs).tolist()
        least, most = min(low), max(high)
        uniform = most - least <= rounding * abs(most)
        news = torch.stack(from_nothing).tolist()
        for name, more, smallest, largest in zip(names.values(), news, low, high, strict=True):
            if more or smallest < 0 or (largest > 1 + rounding and not uniform):
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

    def _uniform(
        self,
        made: Mapping[nn.Parameter, Tensor],
        received: Mapping[nn.Parameter, Tensor],
        sizes: Mapping[nn.Parameter, Tensor] = MappingProxyType({}),
    ) -> dict[nn.Parameter, Tensor] | None:
        """One factor by parameter, as clipping by norm and unscaling leave it; None if it is not that simple."""
        if any(p not in made for p in received):
            return None
        here = [p for p in self._names if p in received]
        factors = _factors([(made[p], received[p], sizes.get(p)) for p in here])
        if factors is None:
            return None
        found = {p: factor for p, factor in zip(here, factors, strict=True) if not math.isnan(factor)}
        most, least = max(found.values(), default=1.0), min(found.values(), default=1.0)
        if not least >= 0 or (most > 1 + _UNIFORM and most - least > _UNIFORM * most):
            return None
        of = {p: found.get(p, most) if p in received else 0.0 for p in self._names if p in made}
        return {p: torch.tensor(factor, dtype=torch.float64, device=p.device) for p, factor in of.items()}


class _Mark:
    """What a gradient is known by."""

    def __init__(self, gradient: Tensor) -> None:
        self.some = sample(gradient)
        self._at = gradient.data_ptr(), gradient._version

    def is_at(self, gradient: Tensor | None) -> bool:
        """Whether it is that gradient, and nobody has openly written to it."""
        return gradient is not None and (gradient.data_ptr(), gradient._version) == self._at


def _factors(pairs: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> list[float] | None:
    """For every (raw, received, size) the number that makes raw received, to rounding; NaN where that could be any.

    None if there is no such number for one of them.

    `size`: what the rounding of each entry is relative to; None: to the entry itself.
    """
    if not all(x.shape == y.shape and x.is_contiguous() and y.is_contiguous() for x, y, _ in pairs):
        return None
    sums = [(square(x), _inner(x, y), square(x if size is None else size)) for x, y, size in pairs]
    factors, bounds = [], []
    for (x, y, size), (squares, inner, sizes) in zip(
        pairs, _numbers([one for of in sums for one in of], 3), strict=True
    ):
        if not math.isfinite(squares + inner) or (squares == 0 and (bool(x.any()) or bool(y.any()))):
            return None
        rounding = 16 * torch.finfo(x.dtype).eps * math.sqrt(sizes)
        left_over = size is not None and math.sqrt(squares) <= rounding
        # in the precision in which it was multiplied with, so that a power of two comes out as one
        exact = math.nan if squares == 0 or left_over else inner / squares
        factors.append(float(torch.tensor(exact, dtype=wide(x.dtype))))
        bounds.append(abs(factors[-1]) * rounding)
    apart = [_apart(x, y, factor).square() for (x, y, _), factor in zip(pairs, factors, strict=True)]
    for (squares,), bound in zip(_numbers(apart, 1), bounds, strict=True):
        if math.sqrt(squares) > bound:
            return None
    return factors


def _numbers(found: Sequence[Tensor], each: int) -> list[list[float]]:
    """The numbers, so many together, which are waited for once."""
    return torch.stack(list(found)).view(-1, each).tolist() if found else []


def _apart(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """|y - factor * x| in float64; zero where the factor could be any."""
    if math.isnan(factor):
        return torch.zeros((), dtype=torch.float64, device=x.device)
    parts = zip(torch.split(x.view(-1), _PART), torch.split(y.view(-1), _PART), strict=True)
    norms = [torch.sub(b, a, alpha=factor).norm(dtype=wide(a.dtype)) for a, b in parts]
    found: Tensor = torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)
    return found


def _in_words(x: Tensor) -> bool:
    """Whether it can be looked at as numbers of eight bytes."""
    return x.is_contiguous() and x.nbytes % 8 == 0 and x.storage_offset() * x.element_size() % 8 == 0


def same(pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> bool:
    """Whether the tensors of every pair are the same, NaN for NaN; a device is waited for once."""
    if any((x is None) != (y is None) for x, y in pairs):
        return False
    both = [(x, y) for x, y in pairs if x is not None and y is not None]
    if not all(x.shape == y.shape for x, y in both):
        return False
    if all(x.device.type == "cpu" for x, _ in both):
        return all(_equal(x, y) for x, y in both)
    return bool(torch.stack([_alike(x, y) for x, y in both]).all())


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.dtype == y.dtype and _in_words(x) and _in_words(y):
        words = x.view(-1).view(torch.int64), y.view(-1).view(torch.int64)  # compared in half the time
        if torch.equal(*words):
            return True
    return torch.equal(x, y) or bool(_alike(x, y))


def _alike(x: Tensor, y: Tensor) -> Tensor:
    return ((x == y) | ((x != x) & (y != y))).all()
