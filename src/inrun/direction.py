"""The credit direction q: every scheme is phi_i = <g_i, q> (design, 2.2).

| scheme     | q                                                                                            |
|------------|----------------------------------------------------------------------------------------------|
| `first`    | c * grad L(w)                                                                                |
| `second`   | c * (grad L(w) - 1/2 H (c * G)), H the target's Hessian at w, by a double backward           |
| `path`     | sum over K equal pieces [a, b] of the path: c_ab * grad L in the middle between w + D(aG)    |
|            | and w + D(bG)                                                                                |

with c the chord of the optimizer's move (inrun.update), or its pull-back where the optimizer moves no coordinate by
itself. The middle is the chord's, not D at (a + b) / 2: where D bends, as in the first steps of Adam, D at half of the
gradient may be nearly all of the move, and the values' sum then misses what the step removes.

`rule="gauss"` takes one piece, with K Gauss-Legendre nodes on its chord; `adaptive` one piece, with 1, 3, 9, ...
equally spaced ones, until the values' sum is the loss that the move really removed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.formed import Ahead
from inrun.gradient import wide
from inrun.parallel import ALONE, Processes, local
from inrun.piece import Moves, Piece, Room
from inrun.tangent.ghost import Pair
from inrun.target import Gradients, Target, gradients, losses, second_orders
from inrun.units import Unit

# a block in which a target's pass shows the units' inputs and output gradients
Watch = Callable[[], AbstractContextManager[dict[Unit, list[Pair]]]]


@dataclass(frozen=True)
class Direction:
    """One target's q, by parameter; the target's loss where the gradient was taken (the mean over the pieces); and how
    many backward passes over the target's batch it took.

    `vectors` is q but for a factor, which all targets have in common: `factors` by parameter, one where there is none.
    """

    vectors: dict[nn.Parameter, Tensor]
    loss: float
    target_gradients: int
    factors: Mapping[nn.Parameter, Tensor | float] = field(default_factory=dict)

    def q(self, p: nn.Parameter) -> Tensor:
        """The parameter's part of q, in float32 at least."""
        vector = self.vectors[p].to(wide(p.dtype))
        return vector * self.factors[p] if p in self.factors else vector


class Scheme(ABC):
    """A way to q. Most take every gradient at its own step, and nothing of one step to the next."""

    @abstractmethod
    def directions(self, targets: Sequence[Target], step: int, moves: Moves) -> dict[str, Direction]:
        """q and loss for every target at this step; a parameter on which a target does not depend is not in its q."""

    def ahead(self, targets: Sequence[Target], step: int, watch: Watch) -> list[Ahead] | None:
        """Every target's gradient, if q will be it but for one number by parameter; None if that is not known yet."""
        return None

    def forget(self) -> None:
        """Take every gradient anew: the weights may have changed otherwise than by a step."""
        return

    def done(self, step: int) -> None:
        """The step was taken: keep what the next one will use."""
        return

    def state_dict(self) -> dict[str, Any]:
        """What later steps need of this one, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        return


def scheme_of(
    scheme: str,
    nodes: int | Literal["adaptive"],
    rule: str,
    tolerance: float,
    max_nodes: int,
    refresh: int = 1,
    names: Mapping[nn.Parameter, str] = MappingProxyType({}),
    processes: Processes = ALONE,
) -> Scheme:
    """The scheme of these settings. Raises InrunError for what does not exist or does not go together."""
    if scheme not in ("first", "second", "path"):
        raise InrunError(f"scheme {scheme!r} does not exist: choose 'first', 'second' or 'path'.")
    if rule not in ("midpoint", "gauss"):
        raise InrunError(f"rule {rule!r} does not exist: choose 'midpoint' or 'gauss'.")
    if nodes != "adaptive" and (isinstance(nodes, str) or nodes < 1):
        raise InrunError(f"nodes={nodes!r}: the path needs at least one node; or 'adaptive'.")
    if refresh < 1 or (refresh > 1 and scheme != "first"):
        raise InrunError(
            f"refresh={refresh} with scheme={scheme!r}: 'first' may use a target's gradient for so many steps, one or "
            "more; the other schemes take it on each step's own way."
        )
    if scheme != "path":
        if nodes != 1 or rule != "midpoint":
            raise InrunError(f"scheme {scheme!r} takes no nodes and no rule: use scheme='path'.")
        return First(refresh, names, processes) if scheme == "first" else Second()
    if nodes != "adaptive":
        return Path(1, gauss_nodes(nodes)) if rule == "gauss" else Path(nodes, [(0.5, 1.0)])
    if rule != "midpoint":
        raise InrunError("nodes='adaptive' has equally spaced nodes, which is the midpoint rule.")
    if not 0 < tolerance < 1 or max_nodes < 1:
        raise InrunError(f"tolerance={tolerance}, max_nodes={max_nodes}: give a share between 0 and 1, and 1 or more.")
    return Adaptive(tolerance, max_nodes, processes)


def gauss_nodes(nodes: int) -> list[tuple[float, float]]:
    """The Gauss-Legendre nodes on [0, 1], each with its weight."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return [(float(x + 1) / 2, float(weight) / 2) for x, weight in zip(places, weights, strict=True)]


@contextmanager
def displaced(displacements: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """The weights moved by these displacements inside the block, and bit for bit what they were after it."""
    kept = {parameter: local(parameter).clone() for parameter in displacements}
    try:
        with torch.no_grad():
            for parameter, displacement in displacements.items():
                local(parameter).add_(displacement)
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in kept.items():
                local(parameter).copy_(weight)


def displacements(moves: Moves, s: float, *, decay: bool = True) -> dict[nn.Parameter, Tensor]:
    """D(s G) by parameter."""
    return {parameter: moved.update.displacement(moved, s, decay=decay) for parameter, moved in moves.items()}


class _Sum:
    """What the nodes of one target's path add up to."""

    def __init__(self) -> None:
        self.q: dict[nn.Parameter, Tensor] = {}
        self.loss, self.nodes = 0.0, 0

    def add(self, piece: Piece, gradients: Gradients, weight: float = 1.0) -> None:
        loss, found = gradients
        for p, part in piece.pull(found).items():
            if weight != 1.0:
                part.mul_(weight)
            self.q[p] = self.q[p].add_(part) if p in self.q else part
        self.loss += loss
        self.nodes += 1

    def total(self, moves: Moves, processes: Processes) -> float:
        """<G, q>: what the values of the step will add up to."""
        parts = [torch.sum(moves[p].gradient * q, dtype=torch.float64) / processes.copies(p) for p, q in self.q.items()]
        return float(processes.total(torch.stack(parts).sum()))

    def direction(self, target_gradients: int) -> Direction:
        return Direction(self.q, self.loss / self.nodes, target_gradients)


def _single(piece: Piece, gradients: Gradients, target_gradients: int) -> Direction:
    """The direction of one piece with one node, whose chord is left to be multiplied with where it is used."""
    loss, found = gradients
    vectors, factors = piece.factored(found)
    return Direction(vectors, loss, target_gradients, factors)


@contextmanager
def _unwatched() -> Iterator[dict[Unit, list[Pair]]]:
    yield {}


class First(Scheme):
    """The paper's first order: the gradient at w, taken every `refresh` steps."""

    def __init__(self, refresh: int, names: Mapping[nn.Parameter, str], processes: Processes) -> None:
        self._room, self._refresh, self._names, self._processes = Room(), refresh, names, processes
        # by target: the step at which its gradient was taken, the loss there, and the gradient
        self._taken: dict[str, tuple[int, float, Ahead]] = {}

    def ahead(self, targets: Sequence[Target], step: int, watch: Watch) -> list[Ahead]:
        self._take(targets, step, list(self._names), watch)
        return [self._taken[target.name][2] for target in targets]

    def directions(self, targets: Sequence[Target], step: int, moves: Moves) -> dict[str, Direction]:
        piece = Piece(moves, 0.0, 1.0, self._room)
        found = {}
        # of all parameters, where others than those that move now may move in a later step
        self._take(targets, step, list(self._names if self._refresh > 1 else moves))
        for target in targets:
            taken, loss, ahead = self._taken[target.name]
            mine = [ahead.gradient.get(p) for p in moves]
            found[target.name] = _single(piece, (loss, mine), int(taken == step))
        return found

    def _take(
        self, targets: Sequence[Target], step: int, parameters: Sequence[nn.Parameter], watch: Watch = _unwatched
    ) -> None:
        """The gradients of those targets whose last is not good for this step, with what `watch` sees of each pass."""
        due = [target for target in targets if not self._lasts(target.name, step)]
        pairs: dict[str, dict[Unit, list[Pair]]] = {}

        @contextmanager
        def watching(target: Target) -> Iterator[None]:
            with watch() as pairs[target.name]:
                yield

        for target, (loss, found) in zip(due, gradients(due, step, parameters, watching), strict=True):
            gradient = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
            self._taken[target.name] = step, loss, Ahead(gradient, pairs.get(target.name, {}))

    def _lasts(self, name: str, step: int) -> bool:
        """Whether the gradient that was taken last is good for this step, too."""
        return name in self._taken and self._taken[name][0] // self._refresh == step // self._refresh

    def forget(self) -> None:
        self._taken.clear()

    def done(self, step: int) -> None:
        self._taken = {name: of for name, of in self._taken.items() if self._lasts(name, step + 1)}

    def state_dict(self) -> dict[str, Any]:
        """The gradients that later steps will use, by target and parameter; empty where none will."""
        return {
            name: {
                "step": step,
                "loss": loss,
                "gradient": {self._names[p]: self._processes.whole(p, g) for p, g in ahead.gradient.items()},
            }
            for name, (step, loss, ahead) in self._taken.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with another run's gradients."""
        self._taken = {}
        for name, of in state.items():
            stored = {p: of["gradient"][n] for p, n in self._names.items() if n in of["gradient"]}
            gradient = {p: self._processes.piece(p, g.to(p.device)) for p, g in stored.items()}
            self._taken[name] = int(of["step"]), float(of["loss"]), Ahead(gradient, {})


class Second(Scheme):
    """The paper's second order: a gradient and a Hessian-vector product at w."""

    def __init__(self) -> None:
        self._room = Room()

    def directions(self, targets: Sequence[Target], step: int, moves: Moves) -> dict[str, Direction]:
        piece = Piece(moves, 0.0, 1.0, self._room)
        back = piece.back()
        found = second_orders(targets, step, back)
        return {target.name: _single(piece, of, 2) for target, of in zip(targets, found, strict=True)}


class Path(Scheme):
    """`pieces` equal pieces, on the chord of each of which the target's gradient is taken at the nodes (x, weight)."""

    def __init__(self, pieces: int, nodes: Sequence[tuple[float, float]]) -> None:
        self._pieces, self._nodes, self._room = pieces, nodes, Room()

    def directions(self, targets: Sequence[Target], step: int, moves: Moves) -> dict[str, Direction]:
        if self._pieces == len(self._nodes) == 1:
            piece, ((x, _),) = Piece(moves, 0.0, 1.0, self._room), self._nodes
            with piece.at(x):
                found = gradients(targets, step, list(moves))
            return {target.name: _single(piece, of, 1) for target, of in zip(targets, found, strict=True)}
        sums = {target.name: _Sum() for target in targets}
        for k in range(self._pieces):
            piece = Piece(moves, k / self._pieces, (k + 1) / self._pieces, self._room)
            for x, weight in self._nodes:
                with piece.at(x):
                    for target, of in zip(targets, gradients(targets, step, list(moves)), strict=True):
                        sums[target.name].add(piece, of, weight)
        return {name: found.direction(self._pieces * len(self._nodes)) for name, found in sums.items()}


class Adaptive(Scheme):
    """More and more nodes, for every target until its values' sum agrees with what the step removes.

    What it removes is measured: the target's loss at w + D(0) and at w + D(G), two forward passes. The sum agrees when
    it differs by `tolerance` of the larger of the two at most, beside what the loss itself may be rounded by. Of three
    times as many equally spaced nodes a third is known already, so that 1, 3, 9, ... nodes cost as many target
    gradients in all. There are never more than `max_nodes`.
    """

    def __init__(self, tolerance: float, max_nodes: int, processes: Processes) -> None:
        self._tolerance, self._max_nodes, self._room, self._processes = tolerance, max_nodes, Room(), processes

    def directions(self, targets: Sequence[Target], step: int, moves: Moves) -> dict[str, Direction]:
        piece = Piece(moves, 0.0, 1.0, self._room)
        removed, slack = self._removed(targets, step, moves, piece)
        sums = {target.name: _Sum() for target in targets}
        found: dict[str, Direction] = {}
        nodes, unsettled = 1, list(targets)
        while unsettled:
            for k in range(nodes):
                if nodes > 1 and k % 3 == 1:  # a node of the third as many
                    continue
                with piece.at((k + 0.5) / nodes):
                    for target, of in zip(unsettled, gradients(unsettled, step, list(moves)), strict=True):
                        sums[target.name].add(piece, of)
            for target in list(unsettled):
                name = target.name
                total = sums[name].total(moves, self._processes) / nodes
                allowed = self._tolerance * max(abs(total), abs(removed[name])) + slack[name]
                if 3 * nodes > self._max_nodes or abs(total - removed[name]) <= allowed:
                    for q in sums[name].q.values():
                        q /= nodes
                    found[name] = sums[name].direction(nodes)
                    unsettled.remove(target)
            nodes *= 3
        return {target.name: found[target.name] for target in targets}

    def _removed(
        self, targets: Sequence[Target], step: int, moves: Moves, piece: Piece
    ) -> tuple[dict[str, float], dict[str, float]]:
        """L(w + D(0)) - L(w + D(G)) by target, and how far its rounding may go."""
        found = []
        for x in (0.0, 1.0):
            with piece.at(x):
                found.append(losses(targets, step))
        eps = max(torch.finfo(moved.weight.dtype).eps for moved in moves.values())
        removed = {target.name: before - after for target, before, after in zip(targets, *found, strict=True)}
        return removed, {target.name: 4 * eps * abs(before) for target, before in zip(targets, found[0], strict=True)}
