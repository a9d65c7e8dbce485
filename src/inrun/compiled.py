"""Hooks that torch.compile traces into the graph of the model, where each unit's is one opaque operator.

A graph holds operators on tensors and nothing else, so that what a hook does besides, it must do in an operator whose
inside the compiler does not see. `inrun::seen` is called in the backward pass with the unit's inputs and the gradient
of its output. What it returns is used: the weights' gradients, or the gradient of `key`, a leaf of no meaning but that
the call is not dropped. The unit stands in the graph as the value of that leaf, so that blocks of one class share one.

Outside of graphs, and where a graph breaks around a unit, the same hook runs as it is.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Function

from inrun.captured import Call, Hook
from inrun.errors import InrunError
from inrun.rows import Rows
from inrun.tangent.fused import is_linear, linear_to_input, turned
from inrun.units import Unit

GRAPHS = torch.__version__ >= "2.13"  # none of before was tested


class State:
    """What hooks in graphs ask for, which each graph is guarded by.

    `mode` is "off" where nothing is captured: no batch is open, or the model is run for something else. Else "on" in
    the model's forward and backward, and "outside" in between. `each` has one entry for every example.
    """

    def __init__(self) -> None:
        self.mode = "off"
        self.each = torch.empty(0)


class Traced(Hook):
    """A hook that is left out of graphs where nothing is captured, and breaks them elsewhere."""

    def __init__(self, state: State, function: Callable[..., Any], *first: Any) -> None:
        super().__init__(function, *first)
        self._function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        self.state = state

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() and self.state.mode == "off":
            return None
        return self._function(*self._first, *args)


class UnitHook(Traced):
    """The hook after a unit's calls. `take(call, n)` is what the operator does: it returns the gradients of the first n
    of weight and bias, of none unless the unit `fuses`.

    Which rows of the output are whose is a fact of the graph: None if the unit cannot be in one.
    """

    def __init__(
        self, state: State, function: Callable[..., Any], unit: Unit, take: Callable[..., list[Tensor]]
    ) -> None:
        super().__init__(state, function, unit)
        self.unit, self.take = unit, take
        self.rows: tuple[int, ...] | None = None
        self.fuses, self.turned = False, is_linear(unit.module) and turned(unit.module)
        self.key = torch.tensor([float(next(_keys))], dtype=torch.float64, device="cpu", requires_grad=True)
        _hooks[int(self.key)] = self

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self._function(*self._first, *args)
        module, positional, named, output = args
        mode, rows = self.state.mode, self.rows
        if mode == "off" or not torch.is_grad_enabled():
            return None
        inputs = (*positional, *named.values())
        if mode != "on" or rows is None or not all(isinstance(x, Tensor) for x in inputs):
            return self._function(*self._first, *args)
        if not output.requires_grad:
            return None
        device = output.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if self.fuses and len(inputs) == 1:
            x = inputs[0].to(output.dtype)
            facts = self.turned, rows, module.training, cast
            return _Fused.apply(output.detach(), x, module.weight, module.bias, self.key, *facts)  # type: ignore[no-untyped-call]
        if rows[1] < 0:  # batchless
            output = output.expand(self.state.each.shape[0], *output.shape[rows[4] :])
        inputs = tuple(x.detach() for x in inputs)
        return _Seen.apply(output, self.key, rows, module.training, cast, tuple(named), *inputs)  # type: ignore[no-untyped-call]


_keys = count(1)
_hooks: WeakValueDictionary[int, UnitHook] = WeakValueDictionary()


def encoded(rows: Rows) -> tuple[int, ...]:
    """The rows as a graph can hold them."""
    return rows.ndim, -1 if rows.dim is None else rows.dim, int(rows.merged), int(rows.blocks), int(rows.led)


def _decoded(rows: Sequence[int]) -> Rows:
    ndim, dim, merged, blocks, led = rows
    return Rows(ndim, None if dim < 0 else dim, bool(merged), bool(blocks), bool(led))


def compile_anew() -> None:
    """Have graphs made anew, with the hooks that there are now: those of before know of none."""
    from torch._dynamo.eval_frame import skip_code  # a second, unless an optimizer of torch was made already

    for hook in (Traced, UnitHook):  # as a frame of its own, around a graph break, it would be a graph without its unit
        skip_code(hook.__call__.__code__)
    # or a graph of a model without hooks would do for another of its class that has some
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()


def _seen(
    b: Tensor,
    inputs: Sequence[Tensor],
    unit: Tensor,
    parameters: Sequence[Tensor],
    rows: Sequence[int],
    names: Sequence[str],
    training: bool,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    hook = _hooks.get(int(unit))
    if hook is None:
        raise InrunError("a backward pass goes through a graph of before the Attributor was detached: run it before.")
    places = len(inputs) - len(names)
    args, kwargs = tuple(inputs[:places]), dict(zip(names, inputs[places:], strict=True))
    call = Call(hook.unit, args, kwargs, training, autocast, None, [x._version for x in inputs], [_decoded(rows)], [b])
    with torch.no_grad(), torch.autocast(b.device.type, enabled=False):
        gradients = hook.take(call, len(parameters))
    return gradients if parameters else [torch.zeros_like(unit)]


def _like(b: Tensor, inputs: Sequence[Tensor], unit: Tensor, parameters: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in parameters or [unit]]


_library = torch.library.Library("inrun", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "seen(Tensor b, Tensor[] inputs, Tensor unit, Tensor[] parameters, int[] rows, str[] names, bool training, "
    "ScalarType? autocast) -> Tensor[]",
    tags=(torch.Tag.cudagraph_unsafe,) if GRAPHS else (),  # played back as a CUDA graph it would not run
)
_library.impl("seen", _seen, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("inrun::seen", _like, lib=_library)


class _Seen(Function):
    """A unit whose inputs and output gradient are handed on."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        unit: Tensor,
        rows: tuple[int, ...],
        training: bool,
        cast: torch.dtype | None,
        names: tuple[str, ...],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(unit, *inputs)
        ctx.facts = rows, names, training, cast
        return output.detach()  # as neither a view nor the same, what follows may work in place on it

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        unit, *inputs = ctx.saved_tensors
        (of_unit,) = torch.ops.inrun.seen(b, inputs, unit, [], *ctx.facts)
        return b, of_unit, None, None, None, None, *[None for _ in inputs]


class _Fused(Function):
    """A linear layer whose weights' gradients are formed example by example (inrun.tangent.fused)."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        unit: Tensor,
        turned: bool,
        rows: tuple[int, ...],
        training: bool,
        cast: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, unit, *([] if bias is None else [bias]))
        ctx.turned, ctx.facts = turned, (rows, (), training, cast)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, unit, *bias = ctx.saved_tensors
        _, needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        of = torch.ops.inrun.seen(b, [x], unit, [weight, *(bias if needs_bias else [])], *ctx.facts)
        to_x = linear_to_input(b, weight.to(b.dtype), ctx.turned) if needs_x else None
        return None, to_x, of[0], of[1] if needs_bias else None, None, None, None, None, None
