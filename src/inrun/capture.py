"""What each unit saw: its inputs, and the gradient of its outputs, of every call in a batch.

A unit is a module that owns trained parameters directly. While a batch is open, a forward hook on each unit watches the
gradients of the outputs: it lets the unit form every example's gradient (inrun.tangent.fused, per_example), or keeps
the inputs of the call until the step (inrun.captured). The model's own hooks tell where a forward begins and ends.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from inrun.captured import Call, Captured, Hook
from inrun.compiled import GRAPHS, State, Traced, UnitHook, compile_anew, encoded
from inrun.errors import InrunError, MixedExamplesWarning
from inrun.found import Found, Leaves, expanded
from inrun.hooks import form, keep_gradient, on_gradient, pay, watch
from inrun.inputs import Inputs
from inrun.kernels import Kernels
from inrun.parallel import Processes
from inrun.probe import Probe
from inrun.rows import Rows, Unknown
from inrun.shortened import find_times, tokens_of
from inrun.state import Before
from inrun.tangent.fused import fused, is_convolution, parameter_gradients
from inrun.tangent.ghost import Pair
from inrun.tangent.per_example import unchanged
from inrun.target import aside, uncompiled
from inrun.trees import flatten, mapped, tensors, unflatten
from inrun.units import Unit, Units

_MOST_FOUND = 64  # structures of inputs whose rows are remembered


class Capture:
    """The hooks on a model. Nothing is kept outside of an open batch, nor in evaluation."""

    def __init__(self, processes: Processes, units: Units, kernels: Kernels, batch_dim: int = 0) -> None:
        self._model, self._units, self._kernels, self._batch_dim = processes.model, units, kernels, batch_dim
        self._processes = processes
        self._device = next(iter(units.all[0].parameters.values())).device.type
        self.autocast: torch.dtype | None = None  # around the newest forward
        self._probe = Probe(processes, units)
        self._warned = False
        self._open: Captured | None = None
        self._before: Callable[[], None] = _nothing
        self._watched: dict[Unit, list[Pair]] | None = None
        self._depth = 0  # of calls of the model within calls of the model
        self._calls_of: dict[Unit, int] = {}
        self._with_gradients = False
        self._put_off: dict[Unit, list[int]] = {}  # calls without gradients, which the backward pass makes again
        # by unit and its output's shapes: how its calls were captured, fused or not, and whose rows they are
        self._made: dict[tuple[object, ...], dict[tuple[object, ...], tuple[Rows | None, ...]]] = {}
        self._found: dict[tuple[object, ...], Found] = {}
        self._now: Found | None = None
        self._merges: set[int] = set()
        self._before_calls: dict[Unit, Before] = {}
        self._state = State()
        self._in_graphs = False  # every unit can be in a graph
        self._hooks: dict[Unit, UnitHook] = {}
        self._handles: list[RemovableHandle] = []
        self._attach()

    def _attach(self) -> None:
        """Put hooks on the model and its units, in place of those that there are."""
        for handle in self._handles:
            handle.remove()
        state, model = self._state, self._model
        self._hooks = {
            unit: self._hooks.get(unit) or UnitHook(state, self._after_unit, unit, self._take)
            for unit in self._units.all
        }
        handles: list[RemovableHandle] = []
        for unit, hook in self._hooks.items():
            if not unit.closed_form and unit.module is not model:
                found = Traced(state, self._before_unit, unit)  # ahead of hooks that change what the module holds
                handles.append(unit.module.register_forward_pre_hook(found, prepend=True))
            handles.append(unit.module.register_forward_hook(hook, with_kwargs=True))
        # the model's own go around its unit's, if it is one
        before, after = Traced(state, self._before_model), Traced(state, self._after_model)
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(model.register_forward_hook(after, always_call=True))
        self._handles = handles
        compile_anew()

    def detach(self) -> None:
        """Take the hooks off, and end a batch that is open."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], None

    @contextmanager
    def batch(self, captured: Captured, before: Callable[[], None]) -> Iterator[None]:
        """Capture the forward and backward passes inside the block; `before` is called ahead of each forward."""
        self._open, self._before = captured, before
        self._depth = 0
        self._put_off.clear()
        self._made.clear()
        self._state.mode, self._state.each = "outside", torch.empty(captured.examples, device="cpu")
        graphs = self._in_graphs and all(self._alone(unit.module) for unit in self._hooks) and not captured.by_token
        try:
            with nullcontext() if graphs else uncompiled():
                yield
        finally:
            self._open, self._before, self._state.mode = None, _nothing, "off"
            self._before_calls.clear()
            for hook in self._hooks.values():
                hook.key.grad = None
        # a call whose outputs met no gradient adds nothing
        captured.calls = [call for call in captured.calls if any(g is not None for g in call.gradients)]
        if captured.time is not None:
            for call in captured.calls:
                call.check_times(captured.examples, captured.time)

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is None or aside():
            return
        self._depth += 1
        if self._depth > 1:
            return
        self._with_gradients = torch.is_grad_enabled()
        if not self._with_gradients:
            return
        self.autocast = self._cast_to()
        self._state.mode = "off"  # while the model is run to find the rows, and for the targets
        examples = self._open.examples
        inputs = Inputs(args, kwargs, self._batch_dim)
        carrying = inputs.carrying(examples)
        modes = tuple(m.training for m in model.modules())
        signature, exact = (modes, inputs.signature), (modes, inputs.exact())
        found = self._found.get(signature)
        if found is not None and found.merged:
            found = self._found.get(exact)
        if not carrying:
            raise InrunError(
                f"{examples} ids were given, but the model is called with inputs of shape {inputs.shapes()}: their "
                f"dimension {self._batch_dim} should hold {examples} examples. Give one id per example; if another "
                "dimension holds them, say batch_dim= to the Attributor."
            )
        unknown = found is None or not set(found.carrying) <= set(carrying) or (found.alone and examples > 1)
        if self._processes.sharded:  # to run the model takes all processes
            unknown = self._processes.any(unknown)
        if found is None or unknown:
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            found = self._probe.find(inputs, examples)
            self._probe.finish(inputs, examples)
            if list(self._hooks) != self._units.all:
                self._found.clear()
                self._attach()
            self._found[signature] = self._found[exact] = found
            self._lay_out()
            self._warn(found)
        if not found.moving:  # or a target would be met as it is before the forward by one kernel, after it by others
            self._before()
        if self._open.by_token:
            found = self._with_times(self._open, inputs, found)
        self._now, self._merges, self._calls_of = found, inputs.merges(found.carrying), {}
        for unit in self._hooks:
            if unit.module is model and not unit.closed_form:
                self._before_unit(unit, model, args)
        self._state.mode = "on"

    def _warn(self, found: Found) -> None:
        """Say once that the examples of a batch are mixed."""
        if not found.mixed or self._warned:
            return
        self._warned = True
        norms = [name for name, m in self._model.named_modules() if isinstance(m, _BatchNorm) and m.training]
        cause, way_out = "the model mixes the examples of a batch", ""
        if norms:
            cause = f"batch normalisation in training mode mixes the examples of a batch ({', '.join(norms)})"
            way_out = " To have one, freeze the statistics (call eval() on these modules after model.train())."
        warnings.warn(
            f"{cause}, as is seen in {found.mixed}. No example has a loss of its own then: its value is what went "
            f"through its own rows, the losses of others included.{way_out}",
            MixedExamplesWarning,
            stacklevel=2,
        )

    def _with_times(self, captured: Captured, inputs: Inputs, found: Found) -> Found:
        """Find where the tokens stand in the units' outputs, once for a structure of inputs."""
        time = tokens_of(inputs, found.carrying, captured.packed)
        if captured.time not in (None, time):
            raise InrunError(
                f"the model was called with sequences of {captured.time} and of {time} tokens in one `batch` block: "
                "give each a block of its own."
            )
        captured.time = time
        if found.times is None:
            times = find_times(self._probe, inputs, found, captured.examples, time, captured.packed)
            found = replace(found, times=times)
            self._found[inputs.signature] = self._found[inputs.exact()] = found
        return found

    def _lay_out(self) -> None:
        """Find the units that can be in a graph: one output, laid out in all calls the same, and a closed form."""
        layouts: dict[Unit, set[Leaves]] = {}
        counted = any(found.counted for found in self._found.values())
        for found in self._found.values():
            for (unit, _), of in found.rows.items():
                layouts.setdefault(unit, set()).add(of)
        for unit, hook in self._hooks.items():
            every = layouts.get(unit, set())
            rows, *others = next(iter(every)) if len(every) == 1 else (None,)
            if not isinstance(rows, Rows) or others or not unit.closed_form or (rows.merged and counted):
                hook.rows = None
            else:
                hook.rows = encoded(rows)
                hook.fuses = rows.dim is not None and self._kernels.fuses(unit) and unchanged(unit.module)
        # the model's own hooks break a graph that they are in, as they are if its forward is torch's; and so do those
        # that gather sharded weights
        broken = self._processes.sharded or type(self._model).forward.__module__.startswith("torch.")
        self._in_graphs = GRAPHS and not broken and all(self._hooks[unit].rows is not None for unit in layouts)

    def _take(self, call: Call, parameters: int) -> list[Tensor]:
        """What `_keep` does, for a call in a graph: in the backward pass, with the gradient at hand."""
        unit, captured = call.unit, self._open
        if captured is None:
            raise InrunError(f"{unit.name}: a backward pass goes through a forward of a batch that is closed.")
        (b,), (layout,), N = call.gradients, call.rows, captured.examples
        assert b is not None
        assert layout is not None
        rows = Rows(b.ndim, 0) if layout.dim is None else expanded(b, layout, N, unit)[1]
        known = unchanged(unit.module) and self._alone(unit.module)
        if parameters and not known:
            raise InrunError(
                f"{unit.name}: its forward or hooks were changed after it was compiled: call torch.compiler.reset()."
            )
        captured.cast |= call.autocast is not None
        inputs = (*call.args, *call.kwargs.values())
        kernel = self._kernels.of(unit, captured, inputs, b, known and _stands_first(unit, layout))
        fuses, keeps = kernel == "fused" and parameters > 0, kernel in ("tangent", "late")
        if kernel == "ghost":
            pay(unit, inputs[0], rows, captured)(b)
        elif not fuses:
            call.rows, call.late = [rows], kernel == "late"
            if keeps:  # the graph uses this memory again
                call.args, call.kwargs, call.gradients = mapped(torch.clone, (call.args, call.kwargs, call.gradients))
                call.versions = [x._version for x in tensors((call.args, call.kwargs))]
                captured.calls.append(call)
            else:
                form(call, captured)(b)
        if not parameters:
            return []
        sink = captured.formed if fuses else None
        return parameter_gradients(unit.module, inputs[0], b, rows, N, sink, parameters)

    def _cast_to(self) -> torch.dtype | None:
        """What autocast casts to here and now; a model's own forward may enter it."""
        return torch.get_autocast_dtype(self._device) if torch.is_autocast_enabled(self._device) else None

    @contextmanager
    def watch(self) -> Iterator[dict[Unit, list[Pair]]]:
        """Inside the block, collect the inputs and output gradients of the units whose kernel can use them."""
        found: dict[Unit, list[Pair]] = {}
        self._watched = found
        try:
            with uncompiled() if any(map(self._kernels.watches, self._hooks)) else nullcontext():
                yield found
        finally:
            self._watched = None

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open is None or aside():
            return
        self._depth -= 1
        if self._depth or not self._in_graphs or self._state.mode == "off":
            return
        self._state.mode = "outside"
        enter: Callable[[Tensor], None] = self._enter  # the backward pass runs checkpointed parts again
        for leaf in tensors(output):
            if leaf.requires_grad:
                leaf.register_hook(enter)  # type: ignore[no-untyped-call]

    def _enter(self, gradient: Tensor) -> None:
        """The backward pass through the model begins."""

        def end() -> None:
            if self._state.mode == "on":
                self._state.mode = "outside"

        if self._state.mode == "outside":
            self._state.mode = "on"
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def _before_unit(self, unit: Unit, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._open is not None and not aside() and torch.is_grad_enabled():
            self._before_calls[unit] = Before(module)

    def _after_unit(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._watched is not None and self._kernels.watches(unit) and output.requires_grad:
            (x,) = (*args, *kwargs.values())
            on_gradient(output, watch(self._watched.setdefault(unit, []), x.detach()))
        if self._open is None or aside() or not unit.stands():
            return None
        if _in_backward():
            return self._after_recomputed(self._open, unit, args, kwargs, output)
        index = self._calls_of.get(unit, 0)
        if self._depth == 1:
            self._calls_of[unit] = index + 1
        if torch.is_grad_enabled():
            return self._keep(self._open, unit, index, args, kwargs, output)
        if self._depth == 1 and self._with_gradients:
            self._put_off.setdefault(unit, []).append(index)
        return None

    def _after_recomputed(
        self, captured: Captured, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """A call inside the backward pass: activation checkpointing runs a part of the forward pass again.

        The reentrant kind ran it without gradients before, so that this is the call that counts. The other kind has
        the call already: what it computes is to be the same again, and nothing else.
        """
        if not torch.is_grad_enabled():
            return None
        if self._put_off.get(unit):
            of = [] if self._now is None else [self._now.rows, self._now.times or {}]
            layouts = {tuple(each.get((unit, k)) for each in of) for k in self._put_off[unit]}
            index = self._put_off[unit].pop()
            if len(layouts) > 1:
                raise InrunError(
                    f"{unit.name} is called several times, laid out otherwise each time, in parts of the model that "
                    "are checkpointed with use_reentrant=True, which runs them again in another order. Use "
                    "use_reentrant=False."
                )
            return self._keep(captured, unit, index, args, kwargs, output)
        leaves, spec = flatten(output)
        made = self._made.get(_key(unit, leaves), {})
        if len(made) > 1:
            raise InrunError(
                f"{unit.name} is called several times with outputs of one shape that belong to the examples in "
                "different ways, in parts of the model that are checkpointed: it cannot be told which call is run "
                "again. Leave one of these calls out of checkpointed parts."
            )
        if not made:
            return None
        (((was_fused, *_), rows),) = made.items()
        if was_fused and rows[0] is not None:
            (x,) = (*args, *kwargs.values())
            return fused(unit.module, x, output, rows[0], captured.examples, None)
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaves[k] = expanded(leaf, rows[k], captured.examples, unit)[0]
        return unflatten(leaves, spec)

    def _alone(self, module: nn.Module) -> bool:
        """Whether no other attributor watches the module: its output's graph must stay, then."""
        owners = {hook.owner for hook in module._forward_hooks.values() if isinstance(hook, Hook)}
        return owners <= {self, None}

    def _keep(
        self, captured: Captured, unit: Unit, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._now is None or (self._depth != 1 and not _in_backward()):
            raise InrunError(
                f"{unit.name} was called outside of the model's own forward, where it cannot be told which rows belong "
                "to which example. Put what is computed there into the forward of the model that the Attributor is "
                "given."
            )
        leaves, spec = flatten(output)
        rows = self._now.rows.get((unit, index))
        if rows is None or len(rows) != len(leaves):
            self._found.clear()  # the next batch finds out anew
            raise InrunError(
                f"{unit.name}: its call number {index + 1} in a forward was not seen when the model was run to find "
                "out whose rows are whose. A forward whose calls change from batch to batch, or between train and "
                "eval mode, cannot be attributed."
            )
        watched = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        for k, unknown in [(k, r) for k, r in enumerate(rows) if isinstance(r, Unknown) and k in watched]:
            leaves[k] = leaves[k].view_as(leaves[k])
            leaves[k].register_hook(_refuse(unknown))
            watched.remove(k)
        rows = tuple(None if isinstance(r, Unknown) else r for r in rows)
        wholes = {k: expanded(leaves[k], rows[k], captured.examples, unit) for k in watched}
        for leaf, found in wholes.values():
            entries = leaf.shape[found.dim or 0] // captured.examples
            if found.merged and self._now.counted and entries not in self._merges:
                raise InrunError(
                    f"{unit.name}: its output of shape {tuple(leaf.shape)} holds another number of entries per example "
                    "than the model's inputs, so that it cannot be told whose they are."
                )
        inputs = (*args, *kwargs.values())
        stands = len(rows) == 1 and rows[0] is not None and _stands_first(unit, rows[0])
        stands = stands and all(type(x) in (Tensor, nn.Parameter) for x in (*inputs, output))
        fits = stands and unchanged(unit.module) and self._alone(unit.module)
        captured.cast |= self._cast_to() is not None
        before = self._before_calls.pop(unit, None)
        if before is not None:
            before.called()
        kernel = self._kernels.of(unit, captured, inputs, output, fits, before.seconds if before else 0.0)
        batchless = [r is not None and r.dim is None for r in rows]
        self._made.setdefault(_key(unit, leaves), {})[kernel == "fused", *batchless] = rows
        if kernel in ("fused", "ghost") and rows[0] is not None:
            (x,) = inputs
            if kernel == "fused":
                return fused(unit.module, x, output, rows[0], captured.examples, captured.formed)
            on_gradient(output, pay(unit, x.detach(), rows[0], captured))
            return None
        args, kwargs = mapped(torch.Tensor.detach, (tuple(args), dict(kwargs)))
        versions = [x._version for x in tensors((args, kwargs))]
        nothing: list[Tensor | None] = [None] * len(leaves)
        call = Call(unit, args, kwargs, unit.module.training, self._cast_to(), before, versions, list(rows), nothing)
        call.late, call.met_in = kernel == "late", self._processes.met_in
        if captured.by_token and self._now.times is not None:
            call.times = self._now.times[unit, index]
        formed = kernel == "formed"
        for k, (leaf, found) in wholes.items():
            call.rows[k], leaves[k] = found, leaf
            hook = form(call, captured) if formed else keep_gradient(call, k)
            if len(watched) == 1:
                on_gradient(leaf, hook)
            else:
                # a view of its own, so that the gradient is this output's alone where one output is made of another
                # (of its own memory, if it is worked on in place, which takes the hooks of a view away)
                leaves[k] = leaf.clone() if (unit, index) in self._now.written else leaf.view_as(leaf)
                leaves[k].register_hook(hook)
        if formed:
            return leaves[0]
        captured.calls.append(call)
        return unflatten(leaves, spec)


def _nothing() -> None:
    return None


def _refuse(unknown: Unknown) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        raise InrunError(unknown.why)

    return hook


def _key(unit: Unit, leaves: Sequence[Any]) -> tuple[object, ...]:
    """The unit and the shapes of its output."""
    return (unit, *(leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves))


def _stands_first(unit: Unit, rows: Rows) -> bool:
    """Whether the rows are where a kernel can take them: of a convolution, first and together."""
    return rows.dim is not None and (not is_convolution(unit.module) or (rows.dim == 0 and rows.blocks))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
