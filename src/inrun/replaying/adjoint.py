"""A step backwards: what the loss at the end makes of what a step leaves, of what it found (design, 2.6).

With lambda the derivatives of the targets' losses at the end by the weights and the optimizer's state after a step, G =
f M the gradient that the optimizer received and M the one that backward made, f what clipping by norm made of it,

    gamma = dL/dM:   lambda pulled back through the optimizer's step (inrun.update, `back`), and through the clipping,
            f gamma_G - (c / (n (n + 1e-6)^2)) <gamma_G, M> M       where f = c / (n + 1e-6) < 1, n = |M|

and lambda before the step is what `back` says, plus the Hessian of the batch's loss times gamma (passes.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from inrun.gradient import wide
from inrun.piece import Moves
from inrun.update import Moved

_BLOCK = 2**16  # entries of a target that are gone through together: what they need fits a processor's cache


@dataclass
class Adjoint:
    """lambda, of [targets, *shape]: by the weights, and by the tensors of the optimizer's state."""

    weights: dict[nn.Parameter, Tensor]
    states: dict[nn.Parameter, dict[str, Tensor]] = field(default_factory=dict)

    def norms(self) -> Tensor:
        """Of the weights' part, by target, float64."""
        squares = [_rows(x).double().square().sum(dim=1) for x in self.weights.values()]
        return torch.stack(squares).sum(dim=0).sqrt()

    def scale(self, factor: float) -> None:
        for x in self._all():
            x.mul_(factor)

    def _all(self) -> list[Tensor]:
        return [*self.weights.values(), *(x for of in self.states.values() for x in of.values())]

    def named(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        """As tensors by name."""
        found = {f"weight/{names[p]}": x for p, x in self.weights.items()}
        for p, of in self.states.items():
            found |= {f"state/{names[p]}/{key}": x for key, x in of.items()}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], names: Mapping[nn.Parameter, str]) -> "Adjoint":
        """The counterpart of `named`."""
        weights = {p: tensors[f"weight/{name}"].to(p.device) for p, name in names.items()}
        states: dict[nn.Parameter, dict[str, Tensor]] = {}
        for p, name in names.items():
            prefix = f"state/{name}/"
            held = {key.removeprefix(prefix): x.to(p.device) for key, x in tensors.items() if key.startswith(prefix)}
            if held:
                states[p] = held
        return cls(weights, states)


@dataclass(frozen=True)
class Clip:
    """What was done to the gradient between backward and step."""

    norm: float | None
    value: float | None

    def received(self, moves: Moves) -> tuple[dict[nn.Parameter, Tensor], float, float]:
        """The gradient that the optimizers receive; the norm of the one that was made, and its factor."""
        made = {p: moved.gradient for p, moved in moves.items()}
        if self.value is not None:
            return {p: g.clamp(-self.value, self.value) for p, g in made.items()}, 0.0, 1.0
        if self.norm is None:
            return made, 0.0, 1.0
        n = float(torch.stack([g.double().square().sum() for g in made.values()]).sum().sqrt())
        factor = min(1.0, self.norm / (n + 1e-6))
        return made if factor == 1.0 else {p: g * factor for p, g in made.items()}, n, factor

    def back(self, gamma: dict[nn.Parameter, Tensor], moves: Moves, n: float, factor: float) -> None:
        """From the derivatives by the received gradient to those by the made one, in place."""
        if self.value is not None:
            for p, x in gamma.items():
                x.mul_(moves[p].gradient.abs() <= self.value)
        elif factor < 1.0 and self.norm is not None:
            inner = [_rows(x.double() * moves[p].gradient).sum(dim=1) for p, x in gamma.items()]
            along = torch.stack(inner).sum(dim=0) * (self.norm / (n * (n + 1e-6) ** 2))
            for p, x in gamma.items():
                part = along.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
                x.mul_(factor).sub_(part * moves[p].gradient)


def step_back(adjoint: Adjoint, moves: Moves, clip: Clip) -> dict[nn.Parameter, Tensor]:
    """gamma, of [targets, *shape] by parameter. `adjoint` becomes what the step found, but for the batch's Hessian.

    A parameter that has no move stays where it is, and so does what is in `adjoint` of it.
    """
    received, n, factor = clip.received(moves)
    gamma = {}
    for p, moved in moves.items():
        gamma[p] = _back(replace(moved, gradient=received[p]), adjoint.weights[p], adjoint.states.setdefault(p, {}))
    clip.back(gamma, moves, n, factor)
    return gamma


def _back(moved: Moved, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The optimizer's own part, block by block: `weight` and `state` are written to, gamma is returned."""
    dtype, entries, moved = wide(moved.weight.dtype), moved.weight.numel(), _contiguous(moved)
    gamma, flat = torch.empty_like(weight), weight.view(len(weight), entries)
    found: dict[str, Tensor] = {}
    held = {key: x.view(len(weight), entries) for key, x in state.items()}
    block = max(_BLOCK // len(weight), 1) if weight.device.type == "cpu" else max(entries, 1)
    for begin in range(0, entries, block):
        part = slice(begin, begin + block)
        g, w, before = moved.update.back(
            _part(moved, part, dtype), flat[:, part], {key: x[:, part] for key, x in held.items()}
        )
        gamma.view(len(weight), entries)[:, part] = g
        flat[:, part] = w
        for key, x in before.items():
            if key not in found:
                found[key] = torch.empty_like(flat)
            found[key][:, part] = x
    state.clear()
    state.update({key: x.view_as(weight) for key, x in found.items()})
    return gamma


def _rows(x: Tensor) -> Tensor:
    """[targets, numbers] of [targets, *shape], where the shape may be that of a single number."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _contiguous(moved: Moved) -> Moved:
    """With its tensors laid out in the order of their indices."""
    state = {key: x.contiguous() if isinstance(x, Tensor) else x for key, x in moved.state.items()}
    return replace(moved, weight=moved.weight.contiguous(), gradient=moved.gradient.contiguous(), state=state)


def _part(moved: Moved, part: slice, dtype: torch.dtype) -> Moved:
    """A block of it, in this precision."""

    def cut(x: Any) -> Any:
        if isinstance(x, Tensor) and x.shape == moved.weight.shape and x.ndim:
            return x.reshape(-1)[part].to(dtype)
        return x

    def cut_weight(x: Tensor) -> Tensor:
        return x.reshape(-1)[part].to(dtype)

    state = {key: x if x is None or key == "step" else cut(x) for key, x in moved.state.items()}
    return replace(moved, weight=cut_weight(moved.weight), gradient=cut_weight(moved.gradient), state=state)
