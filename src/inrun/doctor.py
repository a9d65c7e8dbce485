"""A look at a model before it is trained: what values each of its parameters, at which cost, and whether rightly."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from inrun.attributor import Attributor
from inrun.errors import InrunError, MixedExamplesWarning
from inrun.kernels import Kernel
from inrun.parallel import Processes
from inrun.plan import NAMES, Plan
from inrun.state import State, preserved_random_state
from inrun.target import Evaluation, uncompiled
from inrun.units import trained_parameters

Losses = Callable[[nn.Module, Any], Tensor]

# of the largest value, for the least precise numbers among weights and losses: what rounding may make of one
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF = 5e-2
_KERNELS: tuple[Kernel, ...] = ("auto", "tangent")


@dataclass(frozen=True)
class Covered:
    """A trained parameter: the unit by whose calls it is valued, and the kernels of these; empty if none used it."""

    parameter: str
    entries: int
    unit: str
    module: str
    kernel: str
    lifted: bool


@dataclass
class Diagnosis:
    """What `diagnose` found.

    `mixed` says what mixes the examples of a batch, `problem` why the model is refused; both are empty if nothing does.
    `seconds` is how long a plain forward and backward pass took, `plan` what attribution adds to a step. `errors` are,
    by kernel, the largest error of a value of the batch's examples, relative to the largest value, against per-example
    autograd; they should be below `tolerance`.
    """

    covered: list[Covered] = field(default_factory=list)
    frozen: int = 0
    mixed: str = ""
    problem: str = ""
    seconds: float = 0.0
    plan: Plan | None = None
    errors: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every example's value on this batch is what per-example autograd says."""
        return not self.problem and bool(self.errors) and all(e <= self.tolerance for e in self.errors.values())


def diagnose(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], batch: Any, losses: Losses, batch_dim: int = 0
) -> Diagnosis:
    """Try attribution on one batch, and hold its values against per-example autograd.

    What is compared is <g_i, q> for the batch as its own target, with scheme="first" under SGD, whose q is a number
    times the target's gradient: the kernels and whose rows are whose, which depend on the model; not the optimizer's
    move, which does not. The model, the optimizer and the random states are left as they were.

    Args:
        optimizer: what the plan is for: its parameters are those that are valued.
        batch: two examples or more.
        losses: losses(model, batch) -> tensor [examples], one loss for each, whose mean is trained on.

    Raises:
        InrunError: the losses are not one for each of two or more examples; what is wrong with the model itself is in
            `Diagnosis.problem`.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    found = Diagnosis()
    with _left_as_it_is(model):
        parts = _checked(losses, model, batch)
        examples = len(parts)
        found.seconds = min(_seconds(model, batch, losses) for _ in range(2))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                trained = trained_parameters(model, optimizers)
                found.frozen = sum(p.numel() for p in model.parameters() if p not in trained)
                _plan(found, model, optimizers, batch, losses, examples, batch_dim)
                dtypes = {parts.dtype, *(p.dtype for p in trained)}
                found.tolerance = max(TOLERANCE.get(dtype, _HALF) for dtype in dtypes)
                for kernel in _KERNELS:
                    found.errors[kernel] = _error(model, list(trained), batch, losses, examples, kernel, batch_dim)
            except InrunError as problem:
                found.problem = str(problem)
        found.mixed = next((str(w.message) for w in told if w.category is MixedExamplesWarning), "")
    return found


def _checked(losses: Losses, model: nn.Module, batch: Any) -> Tensor:
    parts = losses(model, batch)
    if not isinstance(parts, Tensor) or parts.ndim != 1 or len(parts) < 2:
        what = f"a tensor of shape {tuple(parts.shape)}" if isinstance(parts, Tensor) else type(parts).__name__
        raise InrunError(
            f"losses(model, batch) must return one loss per example, of two examples or more: a tensor [examples]; got "
            f"{what}. For token losses, the mean of each example's own (reduction='none', then the mean over time)."
        )
    return parts.detach()


def _seconds(model: nn.Module, batch: Any, losses: Losses) -> float:
    begun = time.perf_counter()
    losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - begun


def _plan(
    found: Diagnosis,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batch: Any,
    losses: Losses,
    examples: int,
    batch_dim: int,
) -> None:
    """What the user's optimizer would be attributed with."""
    attributor = Attributor(
        model, optimizers, {"batch": batch}, lambda m, b: losses(m, b).mean(), scheme="path", batch_dim=batch_dim
    )
    try:
        with attributor.batch(range(examples)):
            losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
        found.plan = attributor.plan()
        hows: dict[str, dict[str, None]] = {}
        for call in attributor._kernels.calls:
            hows.setdefault(call.unit.name, {})[NAMES.get(call.how, call.how)] = None
        units = attributor._units.all
        for p, name in attributor._names.items():
            of = [unit for unit in units if any(p is x for x in unit.parameters.values())]
            used = [unit for unit in of if unit.name in hows] or of[:1]
            for unit in used:
                own = [n for n, x in unit.parameters.items() if x is p]
                how, kind = ", ".join(hows.get(unit.name, ())), type(unit.module).__name__
                found.covered.append(Covered(name, p.numel(), unit.name, kind, how, any("." in n for n in own)))
    finally:
        attributor.discard()
        attributor.detach()


def _error(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    batch: Any,
    losses: Losses,
    examples: int,
    kernel: Kernel,
    batch_dim: int,
) -> float:
    """The largest error of a value of `first` under SGD, relative to the largest."""
    rate = 1e-3
    with _left_as_it_is(model), uncompiled():
        parts = losses(model, batch) / examples
        with Evaluation(Processes(model, alone=True))(), torch.enable_grad():
            target = torch.autograd.grad(losses(model, batch).mean(), trained, allow_unused=True)
        wanted = torch.zeros(examples, dtype=torch.float64)
        for i, part in enumerate(parts):
            gradients = torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(gradients, target, strict=True) if g is not None and v is not None]
            wanted[i] = rate * sum(float((g.double() * v.double()).sum()) for g, v in pairs)
    with _left_as_it_is(model):
        optimizer = SGD(trained, lr=rate)
        attributor = Attributor(
            model,
            optimizer,
            {"batch": batch},
            lambda m, b: losses(m, b).mean(),
            scheme="first",
            kernel=kernel,
            batch_dim=batch_dim,
        )
        try:
            with attributor.batch(range(examples)):
                losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        finally:
            attributor.discard()
            attributor.detach()
        assert attributor.last is not None
        values = attributor.last.values["batch"]
    largest = float(wanted.abs().max())
    return float((values - wanted).abs().max()) / largest if largest else float(values.abs().max())


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Weights, gradients, what modules hold and random states are after the block what they were before it."""
    state = State(model)
    kept = [(p, p.grad, p.detach().clone() if p.requires_grad else None) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        with preserved_random_state(model):
            yield
    finally:
        state.restore()
        with torch.no_grad():
            for p, gradient, weight in kept:
                p.grad = gradient
                if weight is not None:
                    p.copy_(weight)
