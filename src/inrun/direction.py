"""The credit direction q: every scheme is phi_i = <g_i, q> (design, 2.2).

| scheme  | q                                                                                      |
|---------|----------------------------------------------------------------------------------------|
| `first` | c * grad L(w)                                                                          |
| `path`  | sum over K equal pieces [a, b] of the path: c_ab * grad L(w + D(s G)), s the midpoint  |

with c the chord of the optimizer's move (inrun.update) and K = `nodes`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.target import Target
from inrun.update import Moved, Update


@dataclass(frozen=True)
class Piece:
    """A piece [a, b] of the path s -> w + D(s G), and where the target's gradient is taken (None: at w itself)."""

    a: float
    b: float
    at: float | None


def pieces(scheme: str, nodes: int) -> list[Piece]:
    """The pieces of a scheme. Raises InrunError for a scheme or a number of nodes that does not exist."""
    if nodes < 1:
        raise InrunError(f"nodes={nodes}: the path needs at least one node.")
    match scheme:
        case "first":
            if nodes != 1:
                raise InrunError(f"scheme 'first' takes no nodes (nodes={nodes} was given): use scheme='path'.")
            return [Piece(0.0, 1.0, None)]
        case "path":
            return [Piece(k / nodes, (k + 1) / nodes, (k + 0.5) / nodes) for k in range(nodes)]
    raise InrunError(f"scheme {scheme!r} does not exist: choose 'first' or 'path'.")


@dataclass(frozen=True)
class Direction:
    """One target's q, by parameter, and the target's loss where the gradient was taken (the mean over the pieces)."""

    q: dict[nn.Parameter, Tensor]
    loss: float


@contextmanager
def displaced(displacements: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """The weights moved by these displacements inside the block, and bit for bit what they were after it."""
    kept = {parameter: parameter.detach().clone() for parameter in displacements}
    try:
        with torch.no_grad():
            for parameter, displacement in displacements.items():
                parameter.add_(displacement)
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in kept.items():
                parameter.copy_(weight)


def displacements(
    update: Update, moves: Mapping[nn.Parameter, Moved], s: float, *, decay: bool = True
) -> dict[nn.Parameter, Tensor]:
    """D(s G) by parameter."""
    return {parameter: update.displacement(moved, s, decay=decay) for parameter, moved in moves.items()}


def directions(
    targets: Sequence[Target],
    step: int,
    update: Update,
    moves: Mapping[nn.Parameter, Moved],
    path: Sequence[Piece],
) -> dict[str, Direction]:
    """q and loss for every target at this step; a parameter on which a target does not depend has no entry in its q."""
    qs: dict[str, dict[nn.Parameter, Tensor]] = {target.name: {} for target in targets}
    losses = {target.name: 0.0 for target in targets}
    parameters = list(moves)
    for piece in path:
        chords = [update.chord(moved, piece.a, piece.b) for moved in moves.values()]
        with displaced({} if piece.at is None else displacements(update, moves, piece.at)):
            for target in targets:
                loss, gradients = target.gradient(step, parameters)
                losses[target.name] += loss / len(path)
                q = qs[target.name]
                for parameter, chord, gradient in zip(parameters, chords, gradients, strict=True):
                    if gradient is not None:
                        q[parameter] = q[parameter].addcmul_(chord, gradient) if parameter in q else chord * gradient
    return {name: Direction(q, losses[name]) for name, q in qs.items()}
