"""A piece [a, b] of the path, for all parameters at once (design, 2.2): its chord, the points on it, its pull-back.

What this costs is memory traffic, not arithmetic. So parameters that are moved coordinate by coordinate are taken in
blocks that fit the processor's cache, of which weight, gradient, moments and chord are read or written once; and what
must last until the target's gradient is there, the chord and the weights, lies in memory that every step uses again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from inrun.parallel import local
from inrun.update import CoupledUpdate, Moved, Pull

Moves = Mapping[nn.Parameter, Moved]

_BLOCK = {"cpu": 2**17}  # entries: a dozen such blocks of float32 fit a core's cache
_SHAPES = 64  # of blocks that are remembered
_WHOLE = 2**26  # elsewhere: a device is kept busy by large blocks


class Room:
    """Memory for tensors of the parameters' shapes, used again at every step."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, nn.Parameter], Tensor] = {}
        self._work: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}

    def like(self, name: str, p: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """The tensor of this name for the parameter, laid out as it is; what it holds is what was written last."""
        held, here = self._held.get((name, p)), local(p)
        if held is None or held.shape != here.shape or held.dtype != dtype or held.device != here.device:
            held = self._held[name, p] = torch.empty_like(here, dtype=dtype)
        return held

    def work(self, block: Tensor) -> list[Tensor]:
        """Four tensors like the block to write to."""
        key = block.shape, block.dtype, block.device
        if key not in self._work:
            if len(self._work) > _SHAPES:
                self._work.clear()
            self._work[key] = [torch.empty_like(block) for _ in range(4)]
        return self._work[key]


class Piece:
    """The piece [a, b]. It must be used before the optimizers step, and before the next piece in the same room."""

    def __init__(self, moves: Moves, a: float, b: float, room: Room) -> None:
        self._moves, self._a, self._b, self._room = moves, a, b, room
        self._chords: dict[nn.Parameter, Tensor | float] = {}
        self._coupled: dict[nn.Parameter, tuple[Tensor, Tensor, Pull]] = {}
        for p, moved in moves.items():
            if isinstance(moved.update, CoupledUpdate):
                self._coupled[p] = (moved.update.displacement(moved, a), *moved.update.pull_back(moved, a, b))
            elif (rate := moved.update.rate(moved, a, b)) is not None:
                self._chords[p] = rate

    @contextmanager
    def at(self, x: float) -> Iterator[None]:
        """The weights at the share x of the chord inside the block, and bit for bit what they were after it."""
        with torch.no_grad():
            there = {p: self._place(p, x) for p in self._moves}
        # memory that no other tensor looks at is exchanged, other memory is written to
        alone = {p: self._moves[p].weight for p in there if _alone(p, self._moves[p])}
        shared = [p for p in there if p not in alone]
        try:
            for p in alone:
                p.data = there[p]
            _exchange(shared, there)
            yield
        finally:
            for p, weight in alone.items():
                p.data = weight
            _exchange(shared[::-1], there)  # in the other order, should two of them lie in one memory

    def factored(
        self, gradients: Sequence[Tensor | None]
    ) -> tuple[dict[nn.Parameter, Tensor], Mapping[nn.Parameter, Tensor | float]]:
        """The piece's part of q from the target's gradients, in the order of the moves, as vectors and factors.

        A parameter without a gradient is in neither; where a vector has no factor, it is q itself.
        """
        vectors = {p: g for p, g in zip(self._moves, gradients, strict=True) if g is not None}
        with torch.no_grad():
            for p in vectors.keys() & self._coupled.keys():
                vectors[p] = self._coupled[p][2](vectors[p])
            self._fill(p for p in vectors if p not in self._coupled)
        return vectors, self._chords

    def pull(self, gradients: Sequence[Tensor | None]) -> dict[nn.Parameter, Tensor]:
        """The same as one: q, in new tensors or those of the gradients."""
        vectors, factors = self.factored(gradients)
        q: dict[nn.Parameter, Tensor] = {}
        storages: set[int] = set()
        for p, vector in vectors.items():
            storage = vector.untyped_storage()
            # autograd may hand out one tensor for two parameters, or one number for many entries
            whole = storage.nbytes() >= vector.nbytes and 0 not in vector.stride()
            mine = storage.data_ptr() not in storages and whole
            storages.add(storage.data_ptr())
            q[p] = vector if mine else vector.clone(memory_format=torch.contiguous_format)
        with torch.no_grad():
            for p, x in q.items():
                if p in factors:
                    x.mul_(factors[p])
        return q

    def back(self) -> dict[nn.Parameter, Tensor]:
        """The way back over the piece, D(aG) - D(bG) = c * G, by parameter."""
        self._fill(p for p in self._moves if p not in self._coupled)
        return {
            p: self._coupled[p][1] if p in self._coupled else moved.gradient * self._chords[p]
            for p, moved in self._moves.items()
        }

    def _fill(self, parameters: Iterator[nn.Parameter]) -> None:
        """The chords of these parameters, where they are not there yet."""
        for p in parameters:
            if p not in self._chords:
                moved = self._moves[p]
                whole = self._room.like("chord", p, moved.gradient.dtype)
                for part, (chord,) in _blocks(moved, [whole]):
                    chord.copy_(part.update.chord(part, self._a, self._b))
                self._chords[p] = whole

    def _place(self, p: nn.Parameter, x: float) -> Tensor:
        """The weight at the share x of the chord, in memory of its own."""
        moved, there = self._moves[p], self._room.like("weight", p, p.dtype)
        if p in self._coupled:
            start, back, _ = self._coupled[p]
            return torch.add(moved.weight, torch.sub(start, back, alpha=x), out=there)
        chord = self._chords.get(p)
        whole = chord if isinstance(chord, Tensor) else self._room.like("chord", p, moved.gradient.dtype)
        for part, (weight, chord_part) in _blocks(moved, [there, whole]):
            weight.copy_(part.weight)
            if chord is None:
                part.update.place(part, self._a, self._b, x, chord_part, weight, self._room.work(weight))
            elif isinstance(chord, float):
                weight.add_(part.update.displacement(part, self._a).add_(part.gradient, alpha=-x * chord))
            else:
                way = part.update.displacement(part, self._a)
                weight.add_(way.addcmul_(chord_part, part.gradient, value=-x))
        if chord is None:
            self._chords[p] = whole
        return there


def _alone(p: nn.Parameter, moved: Moved) -> bool:
    """Whether the parameter's memory is its own: part of no larger one, and looked at by no other tensor."""
    if type(p) is not nn.Parameter:
        return False
    storage = p.untyped_storage()
    between_processes = p.device.type == "cpu" and storage.is_shared()
    if storage.nbytes() != p.nbytes or between_processes:
        return False
    if storage.data_ptr() != moved.weight.untyped_storage().data_ptr():
        return False
    # the parameter, the moved weight, and what `storage` holds of it
    return torch._C._storage_Use_Count(storage._cdata) <= 3


@torch.no_grad()
def _exchange(parameters: Sequence[nn.Parameter], others: Mapping[nn.Parameter, Tensor]) -> None:
    """The parameters' values against those of the other tensors."""
    for p in parameters:
        here = local(p)
        kept = here.clone()
        here.copy_(others[p])
        others[p].copy_(kept)


def _blocks(moved: Moved, others: Sequence[Tensor]) -> Iterator[tuple[Moved, list[Tensor]]]:
    """The parameter in parts of so many entries, with the same parts of the others, which have its shape.

    Where its tensors do not lie in memory alike, it is one part.
    """
    weight = moved.weight
    size = _BLOCK.get(weight.device.type, _WHOLE)
    if weight.numel() > size:
        order = sorted(range(weight.ndim), key=lambda d: -weight.stride()[d])
        states = {k: v for k, v in moved.state.items() if isinstance(v, Tensor) and v.shape == weight.shape}
        turned = [x.permute(order) for x in (weight, moved.gradient, *states.values(), *others)]
        if all(x.is_contiguous() for x in turned):
            for parts in zip(*(torch.split(x.view(-1), size) for x in turned), strict=True):
                n = 2 + len(states)
                state = {**moved.state, **dict(zip(states, parts[2:n], strict=True))}
                yield replace(moved, weight=parts[0], gradient=parts[1], state=state), list(parts[n:])
            return
    yield moved, list(others)
