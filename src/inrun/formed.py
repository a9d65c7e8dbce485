"""What a backward pass formed of every example's own gradients: kept until q is known, or contracted on the spot.

Where a scheme's q is, but for one number by parameter, the target's gradient before the step (`first` under SGD), it
can be had before the backward pass, and each part of g_i is contracted as soon as it is made. Elsewhere g_i is kept
until the optimizer's move and the target's gradient are there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.gradient import wide
from inrun.tangent.ghost import Pair
from inrun.units import Unit

EVERYONE = slice(None)
_ENTRIES = 2**17  # of each vector are looked at together: they fit a processor's cache
_WHOLE = 2**24  # elsewhere


@dataclass
class Ahead:
    """A target's gradient by parameter, taken before the backward pass; and of the units that use it, the inputs and
    output gradients of their calls, of which it is the product.
    """

    gradient: dict[nn.Parameter, Tensor]
    pairs: dict[Unit, list[Pair]]


class Pool:
    """Large tensors that every step needs again."""

    def __init__(self) -> None:
        self._free: dict[nn.Parameter | None, list[Tensor]] = {}

    def take(self, key: nn.Parameter | None, entries: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A flat tensor of at least so many entries."""
        free = self._free.get(key, [])
        for k, held in enumerate(free):
            if held.numel() >= entries and held.dtype == dtype and held.device == like.device:
                return free.pop(k)
        free.clear()  # too small, or of before
        return torch.empty(entries, dtype=dtype, device=like.device)

    def give(self, key: nn.Parameter | None, held: Tensor) -> None:
        """What will not be read any more."""
        self._free.setdefault(key, []).append(held)


class Formed:
    """One batch's gradients by parameter, of those units that form them (a `Sink` of inrun.tangent.fused).

    `kept` holds g_i, [examples, *shape]; or `paid`, <g_i, v> with every target's gradient v in `ahead`, float64
    [targets, examples].
    """

    def __init__(
        self,
        examples: int,
        trained: Mapping[nn.Parameter, str],
        pool: Pool,
        ahead: Sequence[Ahead] | None = None,
    ) -> None:
        self.examples, self.ahead = examples, ahead
        self.kept: dict[nn.Parameter, Tensor] = {}
        self.paid: dict[nn.Parameter, Tensor] = {}
        # made from numbers of half precision, while backward added them up by itself: their type; and of those that
        # were contracted on the spot, the sum of (g_i v)^2 over the examples, [targets]
        self.coarse: dict[nn.Parameter, torch.dtype] = {}
        self.crossed: dict[nn.Parameter, Tensor] = {}
        self._trained, self._pool = trained, pool
        self._held: list[tuple[nn.Parameter | None, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.kept or self.paid)

    @property
    def keeps(self) -> bool:
        """Whether g_i is kept, not contracted at once."""
        return self.ahead is None

    def room(self, p: nn.Parameter, examples: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """Where to write [examples, *shape] for so many examples and these rows of the parameter."""
        shape = (examples, rows.stop - rows.start, *p.shape[1:])
        lasting = self.ahead is None and p not in self.kept and p in self._trained
        key = p if lasting else None
        entries = examples * p[rows].numel()
        held = self._pool.take(key, entries, p, dtype)
        if lasting:
            self._held.append((key, held))
        else:
            self._pool.give(key, held)  # it is read in `take`, before the next room is asked for
        return held[:entries].view(shape)

    def take(self, p: nn.Parameter, rows: slice, g: Tensor, examples: slice = EVERYONE) -> None:
        """[examples, *shape] of these examples and rows of the parameter."""
        if p not in self._trained:
            return
        if self.ahead is None:
            if p in self.kept:
                before = self.kept[p]
                if p.dtype.itemsize < 4:
                    self.coarse[p] = p.dtype
                # a sum of half precision is kept in a wider one
                self.kept[p] = before.add_(g) if before.dtype == wide(p.dtype) else before.to(wide(p.dtype)).add_(g)
            else:
                self.kept[p] = g
            return
        vectors = [v.gradient[p][rows] if p in v.gradient else torch.zeros_like(p[rows]) for v in self.ahead]
        self.pay(p, shares(g, vectors), examples)
        if p in self.coarse:
            more = crossed(g, vectors)
            self.crossed[p] = self.crossed[p] + more if p in self.crossed else more

    def pay(self, p: nn.Parameter, found: Tensor, examples: slice = EVERYONE) -> None:
        """<g_i, v> of these examples, [targets, examples]: a part of it."""
        if p not in self.paid:
            self.paid[p] = found.new_zeros(len(found), self.examples)
        self.paid[p][:, examples] += found

    def contributions(self) -> dict[nn.Parameter, Tensor]:
        """A copy of g_i in the parameters' own precision.

        Raises InrunError if they were contracted on the spot.
        """
        if self.paid:
            raise InrunError(
                "under scheme='first' with SGD every example's gradient is used as soon as it is formed, and is not "
                "there any more for a game: give the Attributor kernel='tangent', or audit_permutations= at once."
            )
        return {p: g.to(p.dtype, copy=True) for p, g in self.kept.items()}

    def replace(self, kept: dict[nn.Parameter, Tensor]) -> None:
        """Read these copies of what is kept from now on."""
        self.release()
        self.kept = kept

    def release(self) -> None:
        """Let the memory be used again: nothing of this batch is read any more."""
        self.kept = {}
        for key, held in self._held:
            self._pool.give(key, held)
        self._held = []
        if self.ahead is not None:
            self.ahead = []  # a loss that is kept keeps the graph, and that this, but not the targets' gradients


def shares(g: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """<g_i, v> of every vector v, which has the shape of g[0]: float64 [vectors, examples]."""
    (found,), *_ = products([g], None, vectors, None)
    return found


def crossed(g: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """The sum of (g_i v)^2 over the examples and entries: float64 [vectors]."""
    squares = torch.zeros_like(vectors[0], dtype=wide(g.dtype))
    for one in g:
        one = one.to(squares.device, squares.dtype)
        squares.addcmul_(one, one)
    return torch.stack([torch.sum(squares * v.to(squares.dtype).square(), dtype=torch.float64) for v in vectors])


def products(
    parts: Sequence[Tensor],
    whole: Tensor | None,
    vectors: Sequence[Tensor],
    factor: Tensor | float | None,
    rounded: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """With q = factor * v for every vector v: <g_i, q> by part, [vectors, examples]; <G, q>, <q, q> and the sum of
    (G q)^2, [vectors].

    All in float64. Every number is read once, in blocks that fit a processor's cache, in which q is made.

    Args:
        parts: g, [examples, *shape] each. whole: G, or None, for which the other results are zero.
        rounded: find the sum of (G q)^2; else it is zero.
    """
    K, device = len(vectors), (vectors or parts)[0].device
    found = [torch.zeros(K, len(g), dtype=torch.float64, device=device) for g in parts]
    inner, squares, both = torch.zeros(3, K, dtype=torch.float64, device=device)
    if not vectors or not vectors[0].numel():
        return found, inner, squares, both
    flat, rows, dtype = [v.reshape(-1) for v in vectors], [g.reshape(len(g), -1) for g in parts], wide(vectors[0].dtype)
    G = None if whole is None else whole.reshape(-1)
    times = factor.reshape(-1) if isinstance(factor, Tensor) and factor.ndim else None
    size = min(len(flat[0]), _ENTRIES if device.type == "cpu" else _WHOLE)
    as_is = K == 1 and times is None
    room = None if as_is else torch.empty(K, size, dtype=dtype, device=device)
    for begin in range(0, len(flat[0]), size):
        some = slice(begin, min(begin + size, len(flat[0])))
        q = flat[0][some].to(dtype)[None] if room is None else room[:, : some.stop - begin]
        if room is not None:
            for v, into in zip(flat, q, strict=True):
                torch.mul(v[some].to(dtype), times[some], out=into) if times is not None else into.copy_(v[some])
        for g, into in zip(rows, found, strict=True):
            # a product in lower precision would lose digits
            block = g[:, some].to(device, dtype)
            into += (block @ q[0])[None] if K == 1 else q @ block.T
        if G is not None:
            received = G[some].to(dtype)
            inner += q @ received
            squares += torch.dot(q[0], q[0]) if K == 1 else torch.linalg.vector_norm(q, dim=1).double().square()
            if rounded:
                both += torch.linalg.vector_norm(q * received, dim=1).double().square()
    if factor is not None and times is None:
        found = [x * factor for x in found]
        inner, squares, both = inner * factor, squares * factor**2, both * factor**2
    return found, inner, squares, both
