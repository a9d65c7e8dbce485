"""The batches of a step once more, at the weights that it found: the values of their examples, -<g_i, gamma>, by the
same contraction as in-run values and the same books; and the Hessian of their loss times gamma.

The Hessian-vector product is a double backward pass, which goes through the graph of the same forward pass that the
values are had from, with attention and recurrent layers in their plain (math) form. Where an operator has none, or that
form draws other random numbers, it is a central difference of gradients,

    (grad(w + e gamma) - grad(w - e gamma)) / 2e,    e |gamma| = sqrt(machine precision) |w|,

whose error is estimated from another difference of twice the length. (A longer one is less rounded, but goes over more
kinks, of ReLU and the like, whose bends are no part of a derivative.)
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from inrun.capture import Capture
from inrun.captured import Captured
from inrun.direction import Direction, Scheme, displaced
from inrun.errors import InrunError
from inrun.formed import Formed, Pool
from inrun.gradient import Received, wide
from inrun.kernels import Kernels
from inrun.packed import as_packed
from inrun.parallel import Processes
from inrun.piece import Moves
from inrun.replaying.record import Batch
from inrun.replaying.trajectory import Trajectory
from inrun.step import Microbatch, Step, as_ids
from inrun.tangent.generic import plain_kernels
from inrun.target import Target, check_twice_differentiable, uncompiled
from inrun.units import Units
from inrun.valuation import Account

Hessian = Literal["auto", "double", "difference"]
_APART = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a gradient by plain kernels from the run's
_HALF_APART = 5e-2
# what torch says where there is no second derivative: an operator without one, a compiled or reentrant part
_NO_SECOND = (
    "not implemented",
    "does not support double backward",
    "once_differentiable",
    "compatible with .grad()",
)


@dataclass(frozen=True)
class Passed:
    """A step's values, and the Hessian of its batches times every target's gamma, by parameter [targets, *shape].

    `error`: the relative error of that product, as estimated, where it was.
    """

    step: Step
    rows: dict[str, dict[str, object]]
    hessian: dict[nn.Parameter, Tensor]
    error: float | None


class _Given(Scheme):
    """A direction for every target that is known: -gamma."""

    def __init__(self) -> None:
        self.gamma: dict[nn.Parameter, Tensor] = {}

    def directions(self, targets: Sequence[Target], step: int, moves: Moves) -> dict[str, Direction]:
        return {
            target.name: Direction({p: -x[k] for p, x in self.gamma.items()}, 0.0, 0)
            for k, target in enumerate(targets)
        }


class Passes:
    """What is done at every step with its batches. It needs the model as the step found it, and leaves it so."""

    def __init__(
        self,
        trajectory: Trajectory,
        processes: Processes,
        units: Units,
        targets: Sequence[Target],
        batch_dim: int,
        hessian: Hessian,
    ) -> None:
        self._trajectory, self._names = trajectory, trajectory.names
        self.hessian: Hessian = hessian
        self._asked: Hessian = hessian
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in trajectory.model.modules())
        self._given = _Given()
        self._account = Account(targets, self._given, units, processes)
        kernels = Kernels("tangent", units, len(targets), False, False, None)
        self._capture = Capture(processes, units, kernels, batch_dim)
        self._pool = Pool()

    def detach(self) -> None:
        """Take the hooks off the model."""
        self._capture.detach()

    def go(self, step: int, moves: Moves, gamma: dict[nn.Parameter, Tensor], *, curved: bool, measured: bool) -> Passed:
        """Values and Hessian of a step.

        Args:
            curved: the Hessian's product is wanted.
            measured: estimate its error, if it is a difference.

        Raises:
            ConservationError: the values do not add up to <M, gamma>. InrunError: there is no double backward, and
                hessian="double".
        """
        batches = self._trajectory.batches(step)
        double = curved and self.hessian != "difference"
        pending: list[Microbatch] = []
        products, error = _zeros(gamma, self._names), None
        if double:
            try:
                pending, made = self._passes(batches, gamma, products)
                double = self._is_the_runs(step, made, moves, batches)
            except RuntimeError as problem:
                if not _no_second(problem):
                    raise
                if self._asked == "double":
                    raise InrunError(
                        f"step {step}: the training loss has no double backward pass ({problem}): use "
                        "hessian='difference'."
                    ) from problem
                double = False
        if double:  # whose gradient has other roundings than the run's: the books are of what the values are of
            moves = {p: replace(moved, gradient=made[p]) for p, moved in moves.items()}
        else:
            for microbatch in pending:
                microbatch.captured.release()
            pending, _ = self._passes(batches, {}, {})
        if curved:
            if self.hessian == "auto":
                self.hessian = "double" if double else "difference"
            if not double:
                products, error = self._difference(batches, gamma, measured or self.hessian == "double")
        self._given.gamma = gamma
        received = Received(self._names)
        received.take(moves)
        with torch.no_grad():
            valued = self._account.value(step, pending, moves, received, False, 0, 0)
        for microbatch in pending:
            microbatch.captured.release()
        return Passed(valued.step, valued.rows, products, error)

    def _passes(
        self,
        batches: Sequence[Batch],
        gamma: Mapping[nn.Parameter, Tensor],
        products: dict[nn.Parameter, Tensor],
    ) -> tuple[list[Microbatch], dict[nn.Parameter, Tensor]]:
        """Forward and backward passes, captured. The Hessian times gamma, if there is one, is added to the products,
        and the gradient is returned, too.
        """
        pending, made = [], dict[nn.Parameter, Tensor]()
        self._trajectory.restore_buffers()
        for batch in batches:
            packed = as_packed(batch.ids)
            ids = as_ids(batch.ids) if packed is None else packed.ids
            examples = len(ids) if packed is None else len(packed.documents)
            formed = Formed(examples, self._names, self._pool)
            captured = Captured(examples, formed, packed=packed, by_token=packed is not None)
            with (
                plain_kernels(self._recurrent) if gamma else nullcontext(),
                uncompiled(),
                self._capture.batch(captured, _nothing),
            ):
                loss = self._trajectory.loss(batch)
                if gamma:
                    self._twice(loss, gamma, captured, products, made)
                else:
                    self._backward(loss, ())
            pending.append(Microbatch(ids, captured))
        return pending, made

    def _twice(
        self,
        loss: Tensor,
        gamma: Mapping[nn.Parameter, Tensor],
        captured: Captured,
        products: dict[nn.Parameter, Tensor],
        made: dict[nn.Parameter, Tensor],
    ) -> None:
        """Add the Hessian of a batch's loss times gamma to the products, by a double backward pass."""
        parameters = [p for p in self._names if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        for call in captured.calls:
            call.ended = True
        _add_products(parameters, gradients, gamma, products)
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:
                made[p] = made[p] + g.detach() if p in made else g.detach()

    def _is_the_runs(self, step: int, made: dict[nn.Parameter, Tensor], moves: Moves, batches: Sequence[Batch]) -> bool:
        """Whether the gradient that plain kernels made is the run's, and there is one of every weight. (Weights inside
        of a reentrant checkpoint are in no graph, and have none. Where an attention's other form rounds otherwise, a
        ReLU close to zero may turn, and the gradient with it.)

        Raises InrunError where it is not, and "double" was asked for.
        """
        apart = whole = 0.0
        unseen = False
        for p, moved in moves.items():
            size = float(moved.gradient.double().square().sum())
            unseen |= p not in made and size > 0
            of = made.setdefault(p, torch.zeros_like(moved.gradient))
            whole += size
            apart += float((of - moved.gradient).double().square().sum())
        halves = any(batch.autocast is not None for batch in batches)
        bound = max(_HALF_APART if halves else _APART.get(p.dtype, _HALF_APART) for p in moves)
        alike = not unseen and apart <= bound**2 * whole
        if not alike and self._asked == "double":
            raise InrunError(
                f"step {step}: the gradient that torch's plain kernels make, which have a double backward pass, is not "
                f"the run's (a relative distance of {math.sqrt(apart / whole) if whole else math.inf:.1e}; rounding is "
                f"below {bound:.0e}): use hessian='auto'."
            )
        return alike

    def _gradient(self, batches: Sequence[Batch]) -> dict[nn.Parameter, Tensor]:
        """The gradient of the step's loss at the weights as they are."""
        parameters = [p for p in self._names if p.requires_grad]
        whole = {p: torch.zeros_like(p, dtype=wide(p.dtype)) for p in parameters}
        self._trajectory.restore_buffers()
        for batch in batches:
            gradients = self._backward(self._trajectory.loss(batch), parameters)
            for p, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    whole[p] += g
        return whole

    def _backward(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """The gradient as training has it: reentrant checkpoints know no other way."""
        try:
            loss.backward()  # type: ignore[no-untyped-call]
            return tuple(p.grad for p in parameters)
        finally:
            for p in self._trajectory.model.parameters():
                p.grad = None

    def _difference(
        self, batches: Sequence[Batch], gamma: Mapping[nn.Parameter, Tensor], measured: bool
    ) -> tuple[dict[nn.Parameter, Tensor], float | None]:
        """The products by central differences, and their relative error if it is to be estimated."""
        targets = len(next(iter(gamma.values())))
        found = _zeros(gamma, self._names)
        error = 0.0
        for k in range(targets):
            along = {p: x[k] for p, x in gamma.items()}
            product = self._central(batches, along, 1.0)
            if measured:
                other, scale = self._central(batches, along, 2.0), _norm(product)
                # twice the length has four times the error, or half of it where rounding is what there is
                apart = _norm({p: other[p] - x for p, x in product.items()})
                error = max(error, apart / scale if scale else 0.0)
            for p, x in product.items():
                found[p][k] = x
        return found, error if measured else None

    def _central(
        self, batches: Sequence[Batch], along: Mapping[nn.Parameter, Tensor], times: float
    ) -> dict[nn.Parameter, Tensor]:
        length = _norm(along)
        weights = _norm({p: p.detach() for p in along})
        if length == 0 or weights == 0:
            return {p: torch.zeros_like(p, dtype=wide(p.dtype)) for p in self._names}
        eps = max(torch.finfo(p.dtype).eps for p in along)
        if any(batch.autocast is not None for batch in batches):
            eps = max(eps, *(torch.finfo(batch.autocast).eps for batch in batches if batch.autocast is not None))
        e = times * eps**0.5 * weights / length
        ends = []
        for sign in (1, -1):
            with displaced({p: (x * (sign * e)).to(p.dtype) for p, x in along.items()}):
                ends.append(self._gradient(batches))
        return {p: x.sub_(ends[1][p]).div_(2 * e) for p, x in ends[0].items()}


def _no_second(error: RuntimeError) -> bool:
    return any(words in str(error) for words in _NO_SECOND)


def _nothing() -> None:
    return None


def _zeros(gamma: Mapping[nn.Parameter, Tensor], names: Collection[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Of all parameters: a gradient changes with the weights that do not move at a step, too."""
    targets = len(next(iter(gamma.values())))
    return {p: p.new_zeros(targets, *p.shape, dtype=wide(p.dtype)) for p in names}


def _norm(of: Mapping[nn.Parameter, Tensor]) -> float:
    return float(torch.stack([x.double().square().sum() for x in of.values()]).sum().sqrt())


def _add_products(
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    gamma: Mapping[nn.Parameter, Tensor],
    products: Mapping[nn.Parameter, Tensor],
) -> None:
    """Add the derivative of <gradient, gamma>, for every target."""
    found = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None and g.requires_grad]
    moving = [(p, g) for p, g in found if p in gamma]
    if not moving:
        return
    check_twice_differentiable([g for _, g in moving])
    targets = len(next(iter(gamma.values())))
    for k in range(targets):
        turns = torch.autograd.grad(
            [g for _, g in moving],
            parameters,
            [gamma[p][k].to(g.dtype) for p, g in moving],
            retain_graph=k + 1 < targets,
            allow_unused=True,
        )
        for p, turn in zip(parameters, turns, strict=True):
            if turn is not None:
                products[p][k] += turn
