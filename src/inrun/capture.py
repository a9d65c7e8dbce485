"""What each unit saw: its inputs, and the gradient of its outputs, of every call in a batch.

A unit is a module that owns trained parameters directly. While a batch is open, a forward hook on each unit keeps the
inputs of the call and watches the gradients of its outputs; the model's own hooks tell where a forward begins and ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from inrun.errors import InrunError
from inrun.rows import Inputs, Rows, find_rows, shuffled
from inrun.tangent.rules import has_closed_form
from inrun.target import preserved_random_state


@dataclass(frozen=True, eq=False)
class Unit:
    """A module and the trained parameters it owns directly, by their names in the module."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]


@dataclass(eq=False)
class Call:
    """One call of a unit: what went in, and by output leaf whose rows they are and the gradient that came "
    "back."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: Tensor | None
    rows: tuple[Rows | None, ...]
    gradients: list[Tensor | None]
    versions: list[int] = field(default_factory=list)

    def check_inputs(self) -> None:
        """Raise InrunError if an input was overwritten since the call: the values would be of other "
        "numbers."""
        if self.versions != [x._version for x in _tensors((self.args, self.kwargs))]:
            raise InrunError(
                f"{self.unit.name}: an input of this module was changed in place after it was used, so its "
                "values cannot be computed. "
                "Use the out-of-place operation there (for an activation: inplace=False)."
            )


@dataclass(eq=False)
class Captured:
    """What one `batch` block saw: the calls that a gradient came back to."""

    examples: int
    calls: list[Call] = field(default_factory=list)


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> dict[nn.Parameter, str]:
    """The parameters that the optimizer moves, with their names in the model.

    Raises InrunError if one is not the model's, or if none is trained.
    """
    names = {p: name for name, p in model.named_parameters()}
    trained = {}
    for k, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p not in names:
                raise InrunError(
                    f"the optimizer's group {k} holds a parameter of shape {tuple(p.shape)} that is not the "
                    "model's. Give the Attributor the module that "
                    "holds all parameters of the optimizer (and build the optimizer after the model was "
                    "moved or wrapped)."
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


class Capture:
    """The hooks on a model. Nothing is kept outside of an open batch, nor in evaluation."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], batch_dim: int = 0) -> None:
        self.model, self.units, self.batch_dim = model, units, batch_dim
        self._open: Captured | None = None
        self._in_forward = False
        self._calls_of: dict[Unit, int] = {}
        self._rows: dict[tuple[object, ...], _Found] = {}
        self._now: _Found | None = None
        self._recording: _Recording | None = None
        self._random_states: dict[Unit, Tensor] = {}
        handles: list[RemovableHandle] = []
        for unit in units:
            handles.append(unit.module.register_forward_pre_hook(self._before_unit(unit)))
            handles.append(unit.module.register_forward_hook(self._after_unit(unit), with_kwargs=True))
        # last, so that a model that owns parameters itself is seen as a unit inside of its own forward
        handles.append(model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True))
        handles.append(model.register_forward_hook(self._after_model, always_call=True))
        self._handles = handles

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def batch(self, examples: int) -> Iterator[Captured]:
        """Capture the forward and backward passes inside the block."""
        self._open = captured = Captured(examples)
        try:
            yield captured
        finally:
            self._open, self._in_forward = None, False
            self._random_states.clear()
        # a call whose outputs met no gradient adds nothing
        captured.calls = [call for call in captured.calls if any(g is not None for g in call.gradients)]

    @property
    def _watching(self) -> bool:
        return self._open is not None and self._recording is None and torch.is_grad_enabled()

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is None or not self._watching:
            return
        examples = self._open.examples
        inputs = Inputs(args, kwargs, self.batch_dim)
        carrying = inputs.carrying(examples)
        found = self._rows.get(inputs.signature)
        if not carrying or (found is not None and not set(found.carrying) <= set(carrying)):
            raise InrunError(
                f"{examples} ids were given, but the model is called with inputs of shape {inputs.shapes()}: "
                "their dimension "
                f"{self.batch_dim} should hold {examples} examples. Give one id per example; if another "
                "dimension holds them, say batch_dim= to the Attributor."
            )
        if found is None:
            found = self._rows[inputs.signature] = self._probe(inputs, carrying, examples)
        self._now, self._in_forward = found, True
        self._calls_of = {}

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._recording is None:
            self._in_forward = False

    def _before_unit(self, unit: Unit) -> Any:
        if has_closed_form(unit.module):
            return lambda module, args: None

        def keep_random_state(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._watching and module.training:
                self._random_states[unit] = torch.get_rng_state()

        return keep_random_state

    def _after_unit(self, unit: Unit) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._recording is not None:
                return self._recording.see(unit, output)
            if self._open is not None and torch.is_grad_enabled():
                return self._keep(unit, args, kwargs, output)
            return None

        return hook

    def _keep(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        captured = self._open
        if captured is None or self._now is None or not self._in_forward:
            raise InrunError(
                f"{unit.name} was called outside of the model's own forward, where it cannot be told which "
                "rows belong to which example. "
                "Put what is computed there into the forward of the model that the Attributor is given."
            )
        index = self._calls_of.get(unit, 0)
        self._calls_of[unit] = index + 1
        leaves, spec = tree_flatten(output)
        rows = self._now.rows.get((unit, index))
        if rows is None or len(rows) != len(leaves):
            raise InrunError(
                f"{unit.name}: its call number {index + 1} in a forward was not seen when the model was run "
                "to find out whose rows are whose. "
                "A forward whose calls change from batch to batch, or between train and eval mode, cannot be "
                "attributed."
            )
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (tuple(args), dict(kwargs)))
        versions = [x._version for x in _tensors((args, kwargs))]
        call = Call(unit, args, kwargs, self._random_states.pop(unit, None), rows, [None] * len(leaves), versions)
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaves[k], call_rows = expanded(leaf, rows[k], captured.examples, unit)
                call.rows = (*call.rows[:k], call_rows, *call.rows[k + 1 :])
                leaves[k].register_hook(_keep_gradient(call, k))
        captured.calls.append(call)
        return tree_unflatten(leaves, spec)

    def _probe(self, inputs: Inputs, carrying: list[int], examples: int) -> "_Found":
        """Run the model to find whose rows are whose (inrun.rows), and that expanding what is batchless "
        "changes nothing."""
        order = shuffled(examples)
        plain = self._record(inputs, carrying, torch.arange(examples))
        again = self._record(inputs, carrying, order)
        rows: dict[tuple[Unit, int], tuple[Rows | None, ...]] = {}
        for key, leaves in plain.seen.items():
            where = key[0].name
            others = again.seen.get(key, [])
            if len(others) != len(leaves):
                raise InrunError(
                    f"{where}: the model calls it a different number of times for {examples} and "
                    f"{examples + 1} examples, which cannot be attributed."
                )
            rows[key] = tuple(
                find_rows(x, y, order, examples, where) if isinstance(x, Tensor) and isinstance(y, Tensor) else None
                for x, y in zip(leaves, others, strict=True)
            )
        found = _Found(rows, tuple(carrying))
        batchless = sorted(
            {unit.name for (unit, _), of in rows.items() if any(r is not None and r.dim is None for r in of)}
        )
        if batchless:
            before = self._record(inputs, carrying, order, train=True)
            after = self._record(inputs, carrying, order, train=True, expand=found)
            if not before.same_as(after):
                raise InrunError(
                    f"{', '.join(batchless)}: the output has no example dimension, and giving it one changes "
                    "what the model computes (a dropout or a reshape "
                    "on it, most likely). Apply the dropout after it was added to the examples' tensor, or "
                    "freeze the module (requires_grad_(False))."
                )
        return found

    def _record(
        self,
        inputs: Inputs,
        carrying: list[int],
        order: Tensor,
        train: bool = False,
        expand: "_Found | None" = None,
    ) -> "_Recording":
        """One forward on the examples `order`, without gradients, that leaves the model as it was; in eval "
        "mode unless `train`."""
        self._recording = recording = _Recording(len(order), expand)
        modes = [(module, module.training) for module in self.model.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        args, kwargs = inputs.reordered(carrying, order)
        try:
            for module, mode in modes:
                module.training = mode and train
            with preserved_random_state(self.model), torch.no_grad():
                recording.output = self.model(*args, **kwargs)
                recording.random_state = torch.get_rng_state()
        except InrunError:
            raise
        except Exception as error:
            raise InrunError(
                f"the model could not be run on {len(order)} examples to find out whose rows are whose "
                f"({type(error).__name__}: {error}). Of its inputs of shape {inputs.shapes()}, "
                f"those with one entry per example in dimension {self.batch_dim} were taken to hold the "
                "examples. If one of them does not, begin with a batch of another size."
            ) from error
        finally:
            self._recording = None
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, copy in buffers:
                    buffer.copy_(copy)
        return recording


@dataclass(frozen=True)
class _Found:
    """The rows of every call's outputs under one structure of inputs, and the inputs that carry the "
    "examples."""

    rows: Mapping[tuple[Unit, int], tuple[Rows | None, ...]]
    carrying: tuple[int, ...]


@dataclass(eq=False)
class _Recording:
    """The outputs of every unit in one forward."""

    examples: int
    expand: _Found | None
    seen: dict[tuple[Unit, int], list[Any]] = field(default_factory=dict)
    output: Any = None
    random_state: Tensor | None = None

    def see(self, unit: Unit, output: Any) -> Any:
        index = sum(1 for other, _ in self.seen if other is unit)
        leaves, spec = tree_flatten(output)
        self.seen[unit, index] = list(leaves)
        if self.expand is None:
            return None
        rows = self.expand.rows.get((unit, index), ())
        leaves = [
            expanded(x, r, self.examples, unit)[0] if isinstance(x, Tensor) and r is not None else x
            for x, r in zip(leaves, rows, strict=True)
        ]
        return tree_unflatten(leaves, spec)

    def same_as(self, other: "_Recording") -> bool:
        """The model's outputs and its use of random numbers are the same, bit for bit."""
        mine, its = _tensors(self.output), _tensors(other.output)
        if (
            self.random_state is None
            or other.random_state is None
            or not torch.equal(self.random_state, other.random_state)
        ):
            return False
        return len(mine) == len(its) and all(map(_identical, mine, its))


def expanded(leaf: Tensor, rows: Rows | None, examples: int, unit: Unit) -> tuple[Tensor, Rows]:
    """The output with an example dimension, and its rows: a view, of the same values for every example, "
    "where it was batchless."""
    if rows is None:
        raise InrunError(
            f"{unit.name}: an output that is a tensor in one forward was none in another; this cannot be attributed."
        )
    if rows.dim is not None:
        if not rows.fits(leaf, examples):
            raise InrunError(
                f"{unit.name}: its output of shape {tuple(leaf.shape)} does not hold {examples} examples in "
                f"dimension {rows.dim}, as it did before."
            )
        return leaf, rows
    if leaf.ndim and leaf.shape[0] == 1:
        return leaf.expand(examples, *leaf.shape[1:]), Rows(0)
    return leaf.expand(examples, *leaf.shape), Rows(0)


def _keep_gradient(call: Call, k: int) -> Any:
    def hook(gradient: Tensor) -> None:
        kept = call.gradients[k]
        gradient = gradient.detach()
        call.gradients[k] = gradient if kept is None else kept + gradient

    return hook


def _identical(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
