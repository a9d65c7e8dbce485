"""A target: a named validation set whose loss the values are about."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inrun.errors import InrunError, NonFiniteError
from inrun.state import State, preserved_random_state
from inrun.tangent.generic import plain_kernels
from inrun.trees import held

DOUBLE_BACKWARD = "attention and recurrent layers by their plain (math) kernels"
Loss = Callable[[nn.Module, Any], Tensor]


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

    def __init__(self, model: nn.Module, *, evaluate: bool = True, called: nn.Module | None = None) -> None:
        self.model = model
        self.called = model if called is None else called  # what torch.compile may have made of the model
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
    """The batches of one target, used in rotation, each for `every` steps."""

    def __init__(self, name: str, batches: Any, loss: Loss, evaluation: Evaluation, every: int = 1) -> None:
        self.name = name
        self.batches = _as_batches(name, batches, evaluation.model)
        self._loss, self._evaluation, self._every = loss, evaluation, every

    def _place(self, step: int) -> int:
        return step // self._every % len(self.batches)

    def loss(self, step: int) -> float:
        """The mean loss of the step's batch, in nats, in eval mode and without a gradient."""
        with self._evaluation(), torch.no_grad():
            return float(self._checked(step).detach())

    def gradient(self, step: int, parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor | None]]:
        """The step's loss and its gradient by parameter: None where the loss does not depend on it.

        Raises InrunError if the loss is not a scalar or does not depend on any of the parameters, NonFiniteError if it
        is not finite.
        """
        with self._evaluation(), torch.enable_grad():
            loss = self._checked(step)
            gradients = _derivatives(loss, parameters)
        return self._finite(loss, step, gradients), gradients

    def second_order(self, step: int, back: Mapping[nn.Parameter, Tensor]) -> tuple[float, list[Tensor | None]]:
        """The step's loss and grad L - 1/2 H back by parameter, H the Hessian of the loss over all parameters.

        By a double backward pass, uncompiled; attention and recurrent layers run in the plain form that has one. Raises
        as `gradient` does, and InrunError where another operator has no double backward.
        """
        parameters = list(back)
        with self._evaluation(), torch.enable_grad(), plain_kernels(), uncompiled():
            loss = self._checked(step)
            gradients = _derivatives(loss, parameters, create_graph=True)
            value = self._finite(loss, step, gradients)
            along = torch.stack(
                [(g * v).sum().double() for g, v in zip(gradients, back.values(), strict=True) if g is not None]
            ).sum()
            try:
                check_twice_differentiable(along)
                turns = _derivatives(along, parameters)
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                raise InrunError(
                    f"target {self.name!r}: scheme='second' needs a double backward pass, and an operator of the model "
                    f"has none ({error}). Use scheme='path', which needs none."
                ) from error
        return value, [
            g if g is None else g.detach() if turn is None else g.detach() - turn / 2
            for g, turn in zip(gradients, turns, strict=True)
        ]

    def _finite(self, loss: Tensor, step: int, gradients: Sequence[Tensor | None]) -> float:
        """The loss as a number, of a target that depends on the model."""
        if all(gradient is None for gradient in gradients):
            raise InrunError(
                f"target {self.name!r}: its loss does not depend on any parameter that the optimizer moves, so no "
                "example can have a value for it. Check that `loss` calls the model it is given, and does not detach "
                "its output."
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss of target {self.name!r} is {value} on its batch {self._place(step)}")
        return value

    def _checked(self, step: int) -> Tensor:
        batch = self.batches[self._place(step)]
        before = dict(held(batch))
        loss = self._loss(self._evaluation.called, batch)
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


def check_twice_differentiable(x: Tensor) -> None:
    """Raise RuntimeError for a backward pass marked as once differentiable, which autograd.grad leaves out unsaid."""
    seen, to_see = set(), [x.grad_fn]
    while to_see:
        node = to_see.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() == "torch::autograd::Error":
                raise RuntimeError(
                    "a function marked with @once_differentiable: its second derivative is not implemented"
                )
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
