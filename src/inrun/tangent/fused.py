"""A linear layer that forms its weight's gradient example by example, in the backward pass itself (design, 2.4).

The weight's gradient is sum_i b_i^T a_i over the examples i. One batched product makes the terms instead of the sum,
with no more arithmetic; what each example contributes is then at hand before the sum is, which goes on to the
optimizer. The forward pass is the module's own: its output is taken as it is.

Shapes: N examples, R rows of each, I and O features in and out.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from inrun.captured import Call
from inrun.probe import tensors
from inrun.rows import Rows


class Sink(Protocol):
    """Who takes every example's gradients."""

    def room(self, p: nn.Parameter, rows: slice, dtype: torch.dtype) -> Tensor:
        """Where to write [examples, *shape] for these rows of the parameter."""

    @property
    def keeps(self) -> bool:
        """Whether it keeps what it takes; else it is done with it at once."""

    def take(self, p: nn.Parameter, rows: slice, g: Tensor) -> None:
        """[examples, *shape] of these rows of the parameter."""


_ROOM = 2**25  # bytes formed at once where they are contracted at once

# by full name of the layer's type: whether its weight lies [in, out]
FUSED = {"torch.nn.modules.linear.Linear": False, "transformers.pytorch_utils.Conv1D": True}


def fuses(module: nn.Module) -> bool:
    """Whether the layer is of a type that this file knows, with parameters that are plain tensors."""
    kind = type(module)
    plain = all(p is None or type(p) is nn.Parameter for p in module._parameters.values())
    return f"{kind.__module__}.{kind.__qualname__}" in FUSED and set(module._parameters) == {"weight", "bias"} and plain


def turned(module: nn.Module) -> bool:
    """Whether the layer's weight lies [in, out]."""
    kind = type(module)
    return FUSED[f"{kind.__module__}.{kind.__qualname__}"]


def fused(module: nn.Module, x: Tensor, y: Tensor, rows: Rows, examples: int, sink: Sink | None) -> Tensor:
    """The module's output y on x, from which the backward pass forms every example's gradient for the sink.

    Without a sink (a forward run again inside the backward pass) nothing is formed twice.
    """
    into = _Into(sink, module, rows, examples)
    output: Tensor = _Fused.apply(y.detach(), x.to(y.dtype), module.weight, module.bias, into)  # type: ignore[no-untyped-call]
    return output


class _Into:
    """What the backward pass needs beside its tensors."""

    def __init__(self, sink: Sink | None, module: nn.Module, rows: Rows, examples: int) -> None:
        self.sink, self.module, self.rows, self.examples = sink, module, rows, examples
        self.turned = turned(module)

    def weight(self, a_NRI: Tensor, b_NRO: Tensor) -> Tensor:
        """The weight's gradient, the sum over the examples; their own go to the sink."""
        weight, sink = self.module.weight, self.sink
        assert isinstance(weight, nn.Parameter)
        assert sink is not None
        left, right = (a_NRI, b_NRO) if self.turned else (b_NRO, a_NRI)
        whole = torch.empty_like(weight.detach())
        for rows in [slice(0, len(weight))] if sink.keeps else parts(weight, self.examples):
            room = sink.room(weight, rows, b_NRO.dtype)
            g = torch.bmm(left[:, :, rows].transpose(1, 2), right, out=room)
            torch.sum(g, dim=0, dtype=whole.dtype, out=whole[rows])
            sink.take(weight, rows, g)
        return whole


def formed_late(call: Call, examples: int) -> Iterator[tuple[nn.Parameter, slice, Tensor]]:
    """Every example's gradients of a call that was kept, in parts: [examples, *shape] of these rows."""
    (gradient,), (rows,), parameters = call.gradients, call.rows, call.unit.parameters
    assert gradient is not None
    assert rows is not None
    weight = parameters["weight"]
    (x,) = tensors(call.inputs(weight.device))
    b, x = gradient.to(weight.device), x.to(gradient.dtype)
    b_NRO = rows.per_example(b, examples).view(examples, -1, b.shape[-1])
    a_NRI = rows.per_example(x, examples).view(examples, -1, x.shape[-1])
    left, right = (a_NRI, b_NRO) if turned(call.unit.module) else (b_NRO, a_NRI)
    for part in parts(weight, examples):
        yield weight, part, torch.bmm(left[:, :, part].transpose(1, 2), right)
    if "bias" in parameters:
        yield parameters["bias"], slice(None), b_NRO.sum(dim=1, dtype=parameters["bias"].dtype)


def parts(p: Tensor, examples: int) -> list[slice]:
    """The rows of a parameter in parts, of which every example's gradients take a moderate room."""
    n = max(1, -(-examples * p.nbytes // _ROOM))
    bounds = [len(p) * k // n for k in range(n + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds) if end > begin]


class _Fused(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, into: _Into) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(x, weight)
        return y.detach()  # as neither a view nor the same, what follows may work in place on it

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        into: _Into = ctx.into
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        to_x = to_weight = to_bias = None
        with torch.autocast(b.device.type, enabled=False):
            if needs_x:
                to_x = b @ (weight.t() if into.turned else weight).to(b.dtype)
            b_NRO = into.rows.per_example(b, into.examples).view(into.examples, -1, b.shape[-1])
            if needs_weight:
                a_NRI = into.rows.per_example(x, into.examples).view(into.examples, -1, x.shape[-1])
                to_weight = into.weight(a_NRI, b_NRO)
            if needs_bias:
                bias, sink = into.module.bias, into.sink
                assert isinstance(bias, nn.Parameter)
                assert sink is not None
                g = b_NRO.sum(dim=1, dtype=bias.dtype)
                sink.take(bias, slice(None), g)
                to_bias = g.sum(dim=0)
        return None, to_x, to_weight, to_bias, None
