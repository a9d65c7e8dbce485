"""The displacement of one parameter, and its chord.

An optimizer moves a parameter from w to w + D(G), where D depends on the gradient G it receives, on its state before
the step and on its hyperparameters. Every scheme needs two things of it: where the weights stand at a point s of the
path, w + D(sG), and the chord of the move over a piece [a, b] of the path, coordinate by coordinate,

    c = -(D(bG) - D(aG)) / G,        c = 0 where G = 0,

so that the move over the piece is -c * G, shared out to the examples as -c * g_i.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inrun.errors import InrunError


@dataclass(frozen=True)
class Moved:
    """One parameter as its optimizer meets it: weight and gradient, its state before the step, its group's
    hyperparameters.
    """

    weight: Tensor
    gradient: Tensor
    state: Mapping[str, Any]
    group: Mapping[str, Any]


class Update(ABC):
    """One kind of optimizer as a pure function of gradient, state and hyperparameters; changes nothing."""

    @abstractmethod
    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        """D(s G), in the shape of the weight. `decay=False` leaves the weight decay out: what momentum alone does."""

    def chord(self, moved: Moved, a: float, b: float) -> Tensor:
        """c of the piece [a, b] by the quotient itself; override it where the difference of two moves cancels."""
        difference = self.displacement(moved, a) - self.displacement(moved, b)
        return torch.where(moved.gradient == 0, 0, difference / moved.gradient)


_updates: dict[type[Optimizer], Update] = {}


def register(*kinds: type[Optimizer]) -> Callable[[type[Update]], type[Update]]:
    """Make an `Update` the one that is used for optimizers of exactly these types."""

    def decorate(update: type[Update]) -> type[Update]:
        for kind in kinds:
            _updates[kind] = update()
        return update

    return decorate


def supported_optimizers() -> list[str]:
    return sorted(kind.__name__ for kind in _updates)


def update_of(optimizer: Optimizer) -> Update:
    """The update of an optimizer's exact type: a subclass may move the weights differently.

    Raises InrunError, naming the optimizers that are supported, for any other.
    """
    kind = type(optimizer)
    if kind not in _updates:
        raise InrunError(
            f"the optimizer {kind.__module__}.{kind.__qualname__} is not supported. Supported, by their exact types: "
            f"{', '.join(supported_optimizers())} (torch.optim). To add one, write its displacement as a subclass of "
            "inrun.update.Update, decorated with inrun.update.base.register(its type); src/inrun/update/sgd.py is an "
            "example."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise InrunError(f"{kind.__name__}(differentiable=True) is not supported: use the ordinary step.")
    return _updates[kind]


def check_move(name: str, before: Tensor, after: Tensor, expected: Tensor, eps: float = 0.0) -> bool:
    """Hold the displacement that the values were computed with against the optimizer's real move.

    `eps` is the precision of the optimizer's own arithmetic, where it is coarser than the weight's. Returns whether the
    move was large enough to show a difference.

    Raises InrunError, naming the parameter, if they differ by more than rounding.
    """
    if not before.numel():
        return False
    eps = max(eps, torch.finfo(before.dtype).eps)
    error, length = float((after - before - expected).abs().max()), float(expected.abs().max())
    rounding = 4 * eps * float(before.abs().max())
    allowed = rounding + 1e3 * eps * length
    if not error <= allowed:
        raise InrunError(
            f"{name}: the optimizer moved this parameter otherwise than inrun's displacement says (by {error:.2e} at "
            f"most, where {allowed:.2e} is rounding), so the step's values would be wrong. Something beside the "
            "optimizer changes the weights in step(), or its step was replaced."
        )
    return length > 10 * rounding
