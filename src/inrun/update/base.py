"""The displacement of one parameter, and its chord.

An optimizer moves a parameter from w to w + D(G), where D depends on the gradient G it receives, on its state before
the step and on its hyperparameters. Every scheme needs two things of it: where the weights stand at a point s of the
path, w + D(sG), and the chord of the move over a piece [a, b] of the path, coordinate by coordinate,

    c = -(D(bG) - D(aG)) / G,        where G = 0 its limit if that is known (Adam, SGD), or 0,

so that the move over the piece is -c * G, shared out to the examples as -c * g_i.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inrun.errors import InrunError

Pull = Callable[[Tensor], Tensor]
Back = tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Moved:
    """One parameter as its optimizer meets it: weight and gradient, its state before the step, its group's
    hyperparameters, and the `Update` that says what the optimizer does with them.
    """

    weight: Tensor
    gradient: Tensor
    state: Mapping[str, Any]
    group: Mapping[str, Any]
    update: "Update"

    def double(self) -> "Moved":
        """The same in float64; single numbers of the state as they are, unless the weight is a single number itself."""
        single = self.weight.ndim > 0
        wide = {k: v.double() if isinstance(v, Tensor) and v.ndim >= single else v for k, v in self.state.items()}
        return replace(self, weight=self.weight.double(), gradient=self.gradient.double(), state=wide)


@dataclass(frozen=True)
class Mix:
    """A move that is linear in the gradients so far, given its scale after the step (design, 2.3):

        D = -scale * (direct * g + through * B) - pull,    B = keep * before + take * g,    g = sign * G + decay

    with B the momentum, `before` what it was (None: zero), `decay` the weight decay in g and `pull` the one beside it.
    """

    scale: Tensor | float
    keep: float
    take: float
    through: float
    direct: float
    sign: float
    before: Tensor | None
    decay: Tensor | None
    pull: Tensor | None


class Update(ABC):
    """One kind of optimizer as a pure function of gradient, state and hyperparameters; changes nothing.

    A subclass says where the weights go, `displacement`. The rest follows from it for every optimizer that moves each
    coordinate by itself; one that does not is a `CoupledUpdate`.
    """

    @abstractmethod
    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        """D(s G), in the shape of the weight. `decay=False` leaves the weight decay out: what momentum alone does."""

    def chord(self, moved: Moved, a: float, b: float) -> Tensor:
        """c of the piece [a, b], by the quotient in float64, where the two moves differ by 1e-9 of themselves and more.

        Override it where the optimizer is used a lot: a closed form costs less, and does not cancel at all.
        """
        wide = moved.double()
        difference = self.displacement(wide, a) - self.displacement(wide, b)
        none = moved.gradient.abs() < torch.finfo(moved.gradient.dtype).tiny
        return torch.where(none, 0.0, difference / wide.gradient).to(moved.gradient.dtype)

    def place(
        self, moved: Moved, a: float, b: float, x: float, chord: Tensor, weight: Tensor, work: Sequence[Tensor]
    ) -> None:
        """Write the chord of [a, b] to `chord`, and add D(aG) - x * chord * G to `weight`, which is the moved weight.

        It is called with blocks of the parameter. Override it where the optimizer is used a lot, with few operations;
        `work` holds four tensors of the block's shape to write to.
        """
        way = self.displacement(moved, a)
        chord.copy_(self.chord(moved, a, b))
        weight.add_(way.addcmul_(chord, moved.gradient, value=-x))

    def rate(self, moved: Moved, a: float, b: float) -> float | None:
        """The chord where it is one number for all coordinates and any gradient, as of SGD; None elsewhere."""
        return None

    def mix(self, moved: Moved) -> Mix:
        """D(G) as a mix of all gradients so far, for momentum="credit"; an optimizer that has none leaves this out."""
        raise InrunError(f"{type(self).__name__}: its move is no linear mix of past gradients.")

    def back(self, moved: Moved, weight: Tensor, state: Mapping[str, Tensor]) -> Back:
        """The step's vector-Jacobian product (design, 2.6): from the derivatives of a loss by what the step leaves, to
        those by what it found, each [targets, *shape], of numbers of float32 at least.

        Args:
            weight: by the weight after the step. state: by the tensors of the state after it, by their names; those
                on which the loss does not depend may be left out.

        Returns:
            By the gradient, the weight and the state before the step. An optimizer that has none leaves this out.
        """
        raise InrunError(
            f"{type(self).__name__}: a replay goes back through the steps of SGD, Adam and AdamW, and not of this "
            "optimizer. To add it, give its Update the method `back` (docs/optimizers.md)."
        )

    def pull_back(self, moved: Moved, a: float, b: float) -> tuple[Tensor, Pull]:
        """The way back over the piece [a, b] of the path, D(aG) - D(bG) = c * G, and a function of the target's
        gradient: the piece's part of the credit direction q, c * gradient.
        """
        chord = self.chord(moved, a, b)
        return chord * moved.gradient, chord.__mul__


class CoupledUpdate(Update):
    """An optimizer whose move of a coordinate depends on others: a matrix step, a norm over the parameter.

    Its pull-back is the mean over the piece of the vector-Jacobian product of D, by two Gauss-Legendre points,

        q = -(b - a) mean of J(sG)^T gradient  +  r G,       r such that <G, q> = <gradient, D(aG) - D(bG)>,

    which takes no more gradients of the target. `smooth` must be made of operations that autograd differentiates.
    The last term pays what the two points leave over, to every example by its share <g_i, G> / |G|^2 of the gradient:
    all of it where D jumps, as at the first step of an optimizer without a past.
    """

    def smooth(self, moved: Moved, s: float) -> Tensor:
        """D(sG), up to a constant, as it is differentiated: override it where `displacement` rounds coarsely."""
        return self.displacement(moved, s)

    def chord(self, moved: Moved, a: float, b: float) -> Tensor:
        raise InrunError(f"{type(self).__name__} moves no coordinate by itself: it has no chord, only a pull-back.")

    def pull_back(self, moved: Moved, a: float, b: float) -> tuple[Tensor, Pull]:
        back = self.displacement(moved, a) - self.displacement(moved, b)
        # the target's gradient, and so the pull, comes while the weights themselves are displaced
        still = replace(moved, weight=moved.weight.clone())
        if moved.weight.dtype not in (torch.float32, torch.float64):
            still = still.double()  # half precision has no digits left for a derivative

        def pull(gradient: Tensor) -> Tensor:
            towards, whole = gradient.to(still.weight.dtype), still.gradient
            q = torch.zeros_like(whole)
            for offset in (-(12**-0.5), 12**-0.5):
                s = (a + b) / 2 + offset * (b - a)
                with torch.enable_grad():
                    g = (whole * s).requires_grad_()
                    (pulled,) = torch.autograd.grad(self.smooth(replace(still, gradient=g), 1.0), g, towards)
                q -= pulled * ((b - a) / 2)
            left = torch.sum(towards * back) - torch.sum(whole * q)
            square = whole.square().sum().clamp(min=torch.finfo(whole.dtype).tiny)
            return q.add_(whole * (left / square)).to(gradient.dtype)

        return back, pull


_updates: dict[type[Optimizer], Update] = {}


def register_update(*kinds: type[Optimizer]) -> Callable[[type[Update]], type[Update]]:
    """Make an `Update` the one that is used for optimizers of exactly these types."""

    def decorate(update: type[Update]) -> type[Update]:
        for kind in kinds:
            _updates[kind] = update()
        return update

    return decorate


def supported_optimizers() -> list[str]:
    return sorted(kind.__name__ for kind in _updates)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, of what accelerate's prepare returns."""
    inner = vars(optimizer).get("optimizer")
    return unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def update_of(optimizer: Optimizer) -> Update:
    """The update of an optimizer's exact type: a subclass may move the weights differently.

    Raises InrunError, naming the optimizers that are supported, for any other.
    """
    kind = type(optimizer)
    if kind not in _updates:
        raise InrunError(
            f"the optimizer {kind.__module__}.{kind.__qualname__} is not supported. Supported, by their exact types: "
            f"{', '.join(supported_optimizers())} (torch.optim). To add one, subclass inrun.Update and decorate it "
            "with inrun.register_update(its type); docs/optimizers.md shows it with Lion."
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
    # by norms: where a gradient cancels, a single coordinate of a move that is nearly a sign may be rounded far
    error, length = float((after - before - expected).norm()), float(expected.norm())
    rounding = 4 * eps * float(before.norm())
    allowed = rounding + min(1e4 * eps, 0.1) * length
    if not error <= allowed:
        raise InrunError(
            f"{name}: the optimizer moved this parameter otherwise than inrun's displacement says (by {error:.2e} in "
            f"all, where {allowed:.2e} is rounding), so the step's values would be wrong. Something beside the "
            "optimizer changes the weights in step(), or its step was replaced."
        )
    return length > 10 * rounding
