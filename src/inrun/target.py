"""A target: a named validation set whose loss the values are about."""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inrun.errors import InrunError, NonFiniteError
from inrun.gradient import sample
from inrun.parallel import Processes, gradient_of
from inrun.state import State, preserved_random_state
from inrun.tangent.generic import plain_kernels
from inrun.trees import held, tensors

DOUBLE_BACKWARD = "attention and recurrent layers by their plain (math) kernels"
Loss = Callable[[nn.Module, Any], Tensor]
Gradients = tuple[float, list[Tensor | None]]  # a loss in nats, and its gradient by parameter: None where it has none


_aside: ContextVar[bool] = ContextVar("aside", default=False)


def aside() -> bool:
    """Whether a model is being run for something else than the user's own forward pass: a target, a probe."""
    return _aside.get()


@contextmanager
def uncompiled() -> Iterator[None]:
    """What torch.compile made is not used inside the block."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def saved_plainly() -> Iterator[None]:
    """A graph made inside the block saves its tensors as they are, whatever is around it: an activation checkpoint of
    the whole model would take them for the model's own.
    """
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        yield


def _itself(x: Tensor) -> Tensor:
    return x


class Evaluation:
    """Runs a model in eval mode (or, with `evaluate=False`, in the mode it is in) and leaves it as it was.

    Modes, random states, buffers and attributes (inrun.state).
    """

    def __init__(self, processes: Processes, *, evaluate: bool = True) -> None:
        self.processes, self.model = processes, processes.model
        self.graphs = False  # are used, and made
        self.autocast: torch.dtype | None = None  # the precision that the training's forward is cast to
        self._evaluate = evaluate

    @contextmanager
    def __call__(self) -> Iterator[State]:
        state = State(self.model)
        token = _aside.set(True)
        torch.clear_autocast_cache()  # casts made with other weights, or without gradients, are not to be met again
        try:
            if self._evaluate:
                for module in self.model.modules():
                    module.training = False
            compiled = nullcontext() if self.graphs else uncompiled()
            with preserved_random_state(self.model), self._cast(), compiled:
                yield state
        finally:
            _aside.reset(token)
            torch.clear_autocast_cache()
            self.processes.reshard()
            state.restore()

    @contextmanager
    def _cast(self) -> Iterator[None]:
        """Autocast as in the training's forward, or as it is; without the cache, which forgets who needs gradients."""
        device = next(self.model.parameters()).device.type
        dtype = self.autocast
        if dtype is None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with nullcontext() if dtype is None else torch.autocast(device, dtype, cache_enabled=False):
            yield


class Target:
    """The batches of one target, used in rotation, `each` of them at a step, for `every` steps."""

    def __init__(
        self, name: str, batches: Any, loss: Loss, evaluation: Evaluation, every: int = 1, each: int = 1
    ) -> None:
        self.name = name
        self.batches = _as_batches(name, batches, evaluation.model)
        if each > len(self.batches):
            raise InrunError(f"target {name!r} has {len(self.batches)} batch(es), and target_batches={each} use more.")
        self.evaluation, self.each = evaluation, each
        self._loss, self._every = loss, every

    def in_rotation(self) -> "Target":
        """The same, with one batch a step."""
        return Target(self.name, self.batches, self._loss, self.evaluation)

    def mark(self) -> str:
        """A few letters that tell its batches from others, by some numbers of every tensor."""
        held = [(x.shape, x.dtype, sample(x).tolist()) for batch in self.batches for x in tensors(batch)]
        return hashlib.sha256(str(held).encode()).hexdigest()[:8]

    def _place(self, step: int, k: int) -> int:
        return (step // self._every * self.each + k) % len(self.batches)

    def loss_of(self, step: int, k: int) -> float:
        """The mean loss of the k-th of the step's batches, in nats, in eval mode and without a gradient."""
        with self.evaluation(), torch.no_grad():
            return float(self._checked(step, k).detach())

    def gradient_of(self, step: int, k: int, parameters: Sequence[nn.Parameter]) -> Gradients:
        """The loss of the k-th of the step's batches and its gradient by parameter.

        Raises InrunError if the loss is not a scalar, or does not depend on any of the parameters.
        """
        with self.evaluation(), torch.enable_grad():
            loss = self._checked(step, k)
            gradients = _derivatives(loss, parameters)
        self.check_depends(gradients)
        return float(loss.detach()), gradients

    def backward(self, step: int, k: int, weight: float) -> float:
        """Add `weight` times the gradient to that of the model's parameters, and return the loss."""
        with self.evaluation(), torch.enable_grad():
            loss = self._checked(step, k)
            if loss.requires_grad:
                (loss * weight).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def second_order_of(self, step: int, k: int, back: Mapping[nn.Parameter, Tensor]) -> Gradients:
        """The loss of the k-th of the step's batches and grad L - 1/2 H back by parameter, H the Hessian of the loss
        over all parameters.

        By a double backward pass, uncompiled; attention and recurrent layers run in the plain form that has one. Raises
        as `gradient_of` does, and InrunError where another operator has no double backward.
        """
        parameters = list(back)
        with self.evaluation(), torch.enable_grad(), plain_kernels(), uncompiled():
            loss = self._checked(step, k)
            gradients = _derivatives(loss, parameters, create_graph=True)
            self.check_depends(gradients)
            along = torch.stack(
                [(g * v).sum().double() for g, v in zip(gradients, back.values(), strict=True) if g is not None]
            ).sum()
            try:
                check_twice_differentiable([along])
                turns = _derivatives(along, parameters)
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                raise InrunError(
                    f"target {self.name!r}: scheme='second' needs a double backward pass, and an operator of the model "
                    f"has none ({error}). Use scheme='path', which needs none."
                ) from error
        return float(loss.detach()), [
            g if g is None else g.detach() if turn is None else g.detach() - turn / 2
            for g, turn in zip(gradients, turns, strict=True)
        ]

    def check_depends(self, gradients: Sequence[Tensor | None]) -> None:
        """Raise InrunError if the target does not depend on the model."""
        if all(gradient is None for gradient in gradients):
            raise InrunError(
                f"target {self.name!r}: its loss does not depend on any parameter that the optimizer moves, so no "
                "example can have a value for it. Check that `loss` calls the model it is given, and does not detach "
                "its output."
            )

    def check_finite(self, loss: float, step: int) -> None:
        """Raise NonFiniteError if the step's loss is not."""
        if not math.isfinite(loss):
            places = ", ".join(str(self._place(step, k)) for k in range(self.each))
            raise NonFiniteError(f"the loss of target {self.name!r} is {loss} on its batch {places}")

    def _checked(self, step: int, k: int) -> Tensor:
        batch = self.batches[self._place(step, k)]
        before = dict(held(batch))
        loss = self._loss(self.evaluation.processes.called, batch)
        if any(before.get(x, version) != version for x, version in held(batch)):
            raise InrunError(
                f"target {self.name!r}: loss(model, batch) writes to the batch in place, which would be another one "
                "when it is used again. Use the out-of-place operation, or a clone()."
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = (
                f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else repr(type(loss))
            )
            raise InrunError(
                f"target {self.name!r}: loss(model, batch) must return a scalar tensor, the batch's mean loss; got "
                f"{what}."
            )
        return loss.reshape(())


def losses(targets: Sequence[Target], step: int) -> list[float]:
    """The step's loss of every target, in nats: the mean over its batches of the step, which processes share out."""
    if not targets:
        return []
    found = torch.zeros(len(targets), dtype=torch.float64)
    processes = targets[0].evaluation.processes
    if processes.sharded:
        for k, target in enumerate(targets):
            for j, weight in processes.together(target.each):
                found[k] += processes.share * weight * target.loss_of(step, j)
    else:
        for k, j in processes.mine(_work(targets)):
            found[k] += targets[k].loss_of(step, j) / targets[k].each
    return _summed(found, targets)


def gradients(
    targets: Sequence[Target],
    step: int,
    parameters: Sequence[nn.Parameter],
    around: Callable[[Target], AbstractContextManager[None]] = lambda target: nullcontext(),
) -> list[Gradients]:
    """The step's loss of every target and its gradient by parameter, which processes share out; `around` every pass.

    Raises InrunError if a loss is not a scalar or does not depend on any of the parameters, NonFiniteError if it is not
    finite.
    """
    if targets and targets[0].evaluation.processes.sharded:
        return [_gradient_in_pieces(target, step, parameters) for target in targets]

    def of(target: Target, k: int) -> Gradients:
        with around(target):
            return target.gradient_of(step, k, parameters)

    return _shared_out(targets, step, parameters, of)


def second_orders(targets: Sequence[Target], step: int, back: Mapping[nn.Parameter, Tensor]) -> list[Gradients]:
    """The same with grad L - 1/2 H back by parameter (`Target.second_order_of`)."""
    return _shared_out(targets, step, list(back), lambda target, k: target.second_order_of(step, k, back))


def _work(targets: Sequence[Target]) -> list[tuple[int, int]]:
    """All the batches of a step, each by its target and its place."""
    return [(k, j) for k, target in enumerate(targets) for j in range(target.each)]


def _shared_out(
    targets: Sequence[Target],
    step: int,
    parameters: Sequence[nn.Parameter],
    gradients_of: Callable[[Target, int], Gradients],
) -> list[Gradients]:
    if not targets:
        return []
    processes = targets[0].evaluation.processes
    found = torch.zeros(len(targets), dtype=torch.float64)
    sums: list[list[Tensor | None]] = [[None] * len(parameters) for _ in targets]
    for k, j in processes.mine(_work(targets)):
        target, mine = targets[k], sums[k]
        loss, parts = gradients_of(target, j)
        found[k] += loss / target.each
        for at, part in enumerate(parts):
            if part is not None:
                so_far, part = mine[at], part if target.each == 1 else part / target.each
                mine[at] = part if so_far is None else so_far + part
    values = _summed(found, targets)
    for target, value in zip(targets, values, strict=True):
        target.check_finite(value, step)
    return list(zip(values, processes.totals(sums, parameters), strict=True))


def _gradient_in_pieces(target: Target, step: int, parameters: Sequence[nn.Parameter]) -> Gradients:
    """The same where weights are sharded: by a backward pass of all processes, as in training, whose own is kept."""
    processes = target.evaluation.processes
    kept = [(p, p.grad) for p in target.evaluation.model.parameters()]
    loss = torch.zeros(1, dtype=torch.float64)
    try:
        for p, _ in kept:
            p.grad = None
        for k, weight in processes.together(target.each):
            loss += processes.share * weight * target.backward(step, k, weight)
        found = [gradient_of(p) for p in parameters]
    finally:
        for p, gradient in kept:
            p.grad = gradient
    (value,) = _summed(loss, [target])
    target.check_depends(found)
    target.check_finite(value, step)
    return value, found


def _summed(found: Tensor, targets: Sequence[Target]) -> list[float]:
    """Losses of which every process has its share."""
    processes = targets[0].evaluation.processes
    if processes.size == 1:
        return [float(x) for x in found]
    device = next(targets[0].evaluation.model.parameters()).device
    return [float(x) for x in processes.total(found.to(device))]


def check_twice_differentiable(found: Sequence[Tensor]) -> None:
    """Raise RuntimeError where autograd.grad would leave a second derivative out unsaid: a backward pass marked as once
    differentiable, and torch's weight norm, which takes the norm for a constant.
    """
    seen, to_see = set(), [x.grad_fn for x in found]
    while to_see:
        node = to_see.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() == "torch::autograd::Error":
                raise RuntimeError(
                    "a function marked with @once_differentiable: its second derivative is not implemented"
                )
            if node.name().startswith("WeightNormInterfaceBackward"):
                raise RuntimeError("torch's weight_norm: its second derivative is not implemented rightly")
            to_see += [following for following, _ in node.next_functions]


def _derivatives(of: Tensor, parameters: Sequence[nn.Parameter], *, create_graph: bool = False) -> list[Tensor | None]:
    """The gradient by parameter; None where there is none."""
    moving = [p for p in parameters if p.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(moving)
    if of.requires_grad:
        found = torch.autograd.grad(of, moving, allow_unused=True, create_graph=create_graph)
    by_parameter = dict(zip(moving, found, strict=True))
    return [by_parameter.get(p) for p in parameters]


def _as_batches(name: str, batches: Any, model: nn.Module) -> list[Any]:
    """One batch (tensor, tuple or mapping), or a list or DataLoader of them, as a list that can be used in rotation."""
    if isinstance(batches, Tensor | tuple | Mapping):
        return [batches]
    if not isinstance(batches, list | DataLoader):
        raise InrunError(
            f"target {name!r}: expected one batch (a tensor, tuple or mapping) or a list or DataLoader of batches, got "
            f"{type(batches).__name__}."
        )
    with preserved_random_state(model):  # a DataLoader draws a seed
        found = list(batches)
    if not found:
        raise InrunError(f"target {name!r} has no batches: give at least one, or leave the target out.")
    return found
