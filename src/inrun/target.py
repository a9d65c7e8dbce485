"""A target: a named validation set whose loss the values are about."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inrun.errors import InrunError, NonFiniteError

Loss = Callable[[nn.Module, Any], Tensor]


@contextmanager
def preserved_random_state(model: nn.Module) -> Iterator[None]:
    """Leave the random states of torch (on the model's devices too), numpy and Python as they were."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class Evaluation:
    """Runs a model in eval mode (or, with `evaluate=False`, in the mode it is in) and leaves it as it was.

    Modes, random states and buffers: those that a forward writes to, replaces, makes or takes away.
    """

    def __init__(self, model: nn.Module, *, evaluate: bool = True) -> None:
        self.model = model
        self._evaluate = evaluate

    @contextmanager
    def __call__(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        buffers = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module, _ in modes]
        copies = [(b, b._version, b.clone()) for _, held, _ in buffers for b in held.values() if b is not None]
        try:
            if self._evaluate:
                for module, _ in modes:
                    module.training = False
            with preserved_random_state(self.model):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, held, passing in buffers:
                module._buffers.clear()
                module._buffers.update(held)
                module._non_persistent_buffers_set = passing
            with torch.no_grad():
                for buffer, version, copy in copies:
                    if buffer._version != version:
                        buffer.copy_(copy)


class Target:
    """The batches of one target, used in rotation: step t uses batch t modulo their number."""

    def __init__(self, name: str, batches: Any, loss: Loss, evaluation: Evaluation) -> None:
        self.name = name
        self.batches = _as_batches(name, batches, evaluation.model)
        self._loss, self._evaluation = loss, evaluation

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
            moving = [p for p in parameters if p.requires_grad]
            found: Sequence[Tensor | None] = [None] * len(moving)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, moving, allow_unused=True)
        by_parameter = dict(zip(moving, found, strict=True))
        gradients = [by_parameter.get(p) for p in parameters]
        if all(gradient is None for gradient in gradients):
            raise InrunError(
                f"target {self.name!r}: its loss does not depend on any parameter that the optimizer moves, so no "
                "example can have a value for it. Check that `loss` calls the model it is given, and does not detach "
                "its output."
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss of target {self.name!r} is {value} on its batch {step % len(self.batches)}")
        return value, gradients

    def _checked(self, step: int) -> Tensor:
        loss = self._loss(self._evaluation.model, self.batches[step % len(self.batches)])
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = (
                f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else repr(type(loss))
            )
            raise InrunError(
                f"target {self.name!r}: loss(model, batch) must return a scalar tensor, the batch's mean loss; got "
                f"{what}."
            )
        return loss.reshape(())


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
