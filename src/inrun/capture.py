"""What each unit saw: its inputs, and the gradient of its outputs, of every call in a batch.

A unit is a module that owns trained parameters directly. While a batch is open, a forward hook on each unit keeps the
inputs of the call and watches the gradients of its outputs; the model's own hooks tell where a forward begins and ends.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from inrun.errors import InrunError
from inrun.probe import Found, Inputs, Probe, Unit, expanded, tensors
from inrun.rows import Rows
from inrun.tangent.generic import RandomState
from inrun.tangent.rules import has_closed_form


@dataclass(eq=False)
class Call:
    """One call of a unit: what went in, and by output leaf whose rows they are and the gradient that came back."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    random_state: RandomState | None
    versions: list[int]
    rows: list[Rows | None]
    gradients: list[Tensor | None]

    @cached_property
    def gradient_norms(self) -> list[Tensor | None]:
        """The norm of every gradient, for all targets once."""
        return [gradient.norm() if gradient is not None else None for gradient in self.gradients]

    def check_inputs(self) -> None:
        """Raise InrunError if an input was overwritten since the call: the values would be of other numbers."""
        if self.versions != [x._version for x in tensors((self.args, self.kwargs))]:
            raise InrunError(
                f"{self.unit.name}: an input of this module was changed in place after it was used, so its values "
                "cannot be computed. Use the out-of-place operation there, or load the next batch into other memory."
            )


@dataclass(eq=False)
class Captured:
    """What one `batch` block saw: the calls that a gradient came back to."""

    examples: int
    calls: list[Call] = field(default_factory=list)


def trained_parameters(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[nn.Parameter, str]:
    """The parameters that the optimizers move, with their names in the model.

    Raises InrunError if one is not the model's, if two optimizers hold it, or if none is trained.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise InrunError(f"{name}: an embedding with max_norm rewrites its weight when read: build it without.")
    names = {p: name for name, p in model.named_parameters()}
    trained: dict[nn.Parameter, str] = {}
    groups = [(k, group) for optimizer in optimizers for k, group in enumerate(optimizer.param_groups)]
    for k, group in groups:
        for p in group["params"]:
            if p in trained:
                raise InrunError(f"{names[p]} is held by two optimizers: give each parameter to one of them.")
            if p not in names:
                raise InrunError(
                    f"the optimizer's group {k} holds a parameter of shape {tuple(p.shape)} that is not the model's. "
                    "Give the Attributor the module that holds all parameters of the optimizer (and build the "
                    "optimizer after the model was moved or wrapped)."
                )
            if p.is_complex():
                raise InrunError(f"{names[p]}: complex parameters are not supported.")
            if p.requires_grad:
                trained[p] = names[p]
    if not trained:
        raise InrunError(
            "the model is frozen: no parameter of the optimizer has requires_grad, so no example can have a value."
        )
    return trained


def find_units(model: nn.Module, trained: set[nn.Parameter]) -> list[Unit]:
    """All modules of the model that own at least one of the trained parameters directly."""
    units = []
    for name, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if p is not None and p in trained}
        if own:
            units.append(Unit(name or type(model).__name__, module, own))
    return units


_MOST_FOUND = 64  # structures of inputs whose rows are remembered


class Capture:
    """The hooks on a model. Nothing is kept outside of an open batch, nor in evaluation."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], batch_dim: int = 0) -> None:
        self._model, self._batch_dim = model, batch_dim
        self._batch_norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
        self._probe = Probe(model)
        self._open: Captured | None = None
        self._depth = 0  # of calls of the model within calls of the model
        self._calls_of: dict[Unit, int] = {}
        self._found: dict[tuple[object, ...], Found] = {}
        self._now: Found | None = None
        self._merges: set[int] = set()
        self._random_states: dict[Unit, RandomState] = {}
        handles: list[RemovableHandle] = []
        for unit in units:
            if not has_closed_form(unit.module):
                handles.append(unit.module.register_forward_pre_hook(_Hook(self._before_unit, unit)))
            handles.append(unit.module.register_forward_hook(_Hook(self._after_unit, unit), with_kwargs=True))
        # the model's own go around its unit's, if it is one
        handles.append(model.register_forward_pre_hook(_Hook(self._before_model), with_kwargs=True, prepend=True))
        handles.append(model.register_forward_hook(_Hook(self._after_model), always_call=True))
        self._handles = handles

    def detach(self) -> None:
        """Take the hooks off, and end a batch that is open."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], None

    @contextmanager
    def batch(self, examples: int) -> Iterator[Captured]:
        """Capture the forward and backward passes inside the block."""
        self._open = captured = Captured(examples)
        self._depth = 0
        try:
            yield captured
        finally:
            self._open = None
            self._random_states.clear()
        # a call whose outputs met no gradient adds nothing
        captured.calls = [call for call in captured.calls if any(g is not None for g in call.gradients)]

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is None or self._probe.recording:
            return
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        self._refuse_unsupported()
        examples = self._open.examples
        inputs = Inputs(args, kwargs, self._batch_dim)
        carrying = inputs.carrying(examples)
        found = self._found.get(inputs.signature)
        if found is not None and found.merged:
            found = self._found.get(inputs.exact())
        if not carrying:
            raise InrunError(
                f"{examples} ids were given, but the model is called with inputs of shape {inputs.shapes()}: their "
                f"dimension {self._batch_dim} should hold {examples} examples. Give one id per example; if another "
                "dimension holds them, say batch_dim= to the Attributor."
            )
        if found is None or not set(found.carrying) <= set(carrying):
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            found = self._probe.find(inputs, examples)
            self._found[inputs.signature] = self._found[inputs.exact()] = found
        self._now, self._merges, self._calls_of = found, inputs.merges(found.carrying), {}

    def _refuse_unsupported(self) -> None:
        for name, module in self._batch_norms:
            if not module.training and module.running_mean is not None:
                continue
            raise InrunError(
                f"{name}: batch normalisation in training mode mixes the examples of a batch, so that none has a "
                "gradient of its own. Freeze its statistics (call eval() on this module after model.train()), or use "
                "GroupNorm."
            )
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise InrunError("autocast is not supported yet: train in the parameters' own precision.")

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open is not None and not self._probe.recording:
            self._depth -= 1

    def _before_unit(self, unit: Unit, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._open is not None and not self._probe.recording and torch.is_grad_enabled() and module.training:
            self._random_states[unit] = RandomState.of(module)

    def _after_unit(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._probe.recording:
            return self._probe.see(unit, output)
        if self._open is None:
            return None
        index = self._calls_of.get(unit, 0)
        if self._depth == 1:
            self._calls_of[unit] = index + 1
        return self._keep(self._open, unit, index, args, kwargs, output) if torch.is_grad_enabled() else None

    def _keep(
        self, captured: Captured, unit: Unit, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._now is None or self._depth != 1:
            raise InrunError(
                f"{unit.name} was called outside of the model's own forward, where it cannot be told which rows belong "
                "to which example. Put what is computed there into the forward of the model that the Attributor is "
                "given (activation checkpointing, which runs a part of it again in the backward pass, is not "
                "supported yet)."
            )
        leaves, spec = tree_flatten(output)
        rows = self._now.rows.get((unit, index))
        if rows is None or len(rows) != len(leaves):
            self._found.clear()  # the next batch finds out anew
            raise InrunError(
                f"{unit.name}: its call number {index + 1} in a forward was not seen when the model was run to find "
                "out whose rows are whose. A forward whose calls change from batch to batch, or between train and "
                "eval mode, cannot be attributed."
            )
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (tuple(args), dict(kwargs)))
        versions = [x._version for x in tensors((args, kwargs))]
        random_state = self._random_states.pop(unit, None)
        nothing: list[Tensor | None] = [None] * len(leaves)
        call = Call(unit, args, kwargs, unit.module.training, random_state, versions, list(rows), nothing)
        watched = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        for k in watched:
            leaf, found = expanded(leaves[k], rows[k], captured.examples, unit)
            entries = leaf.shape[found.dim or 0] // captured.examples
            if found.merged and self._now.counted and entries not in self._merges:
                raise InrunError(
                    f"{unit.name}: its output of shape {tuple(leaf.shape)} holds another number of entries per example "
                    "than the model's inputs, so that it cannot be told whose they are."
                )
            # a view of its own, so that the gradient is this output's alone where one output is made of another
            leaves[k] = leaf.view_as(leaf) if len(watched) > 1 else leaf
            call.rows[k] = found
            leaves[k].register_hook(_keep_gradient(call, k))
        captured.calls.append(call)
        return tree_unflatten(leaves, spec)


class _Hook:
    """A hook that stays with its model: a copy or a pickle of the model gets one that does nothing."""

    def __init__(self, function: Callable[..., Any], *first: Any) -> None:
        self._function, self._first = function, first

    def __call__(self, *args: Any) -> Any:
        return self._function(*self._first, *args)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    return None


def _keep_gradient(call: Call, k: int) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        kept = call.gradients[k]
        gradient = gradient.detach()
        call.gradients[k] = gradient if kept is None else kept + gradient

    return hook
