"""Layers that form their weight's gradient example by example, in the backward pass itself (design, 2.4).

A linear layer's weight has the gradient sum_i b_i^T a_i over the examples i. One batched product makes the terms, not
their sum, with no more arithmetic; what each example contributes is then at hand before the sum is, which goes on to
the optimizer. A convolution is the same with patches for rows (inrun.tangent.convolution). The forward pass is the
module's own: its output is taken as it is.

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
from inrun.tangent.convolution import per_example_convolution


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

# linear layers by the full name of their type: whether the weight lies [in, out]
_LINEAR = {"torch.nn.modules.linear.Linear": False, "transformers.pytorch_utils.Conv1D": True}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_linear(module: nn.Module) -> bool:
    """Whether the layer is a linear one of a type that this file knows, with parameters that are plain tensors."""
    return _name(module) in _LINEAR and _plain(module)


def is_convolution(module: nn.Module) -> bool:
    return type(module) in _CONVOLUTIONS and _plain(module)


def turned(module: nn.Module) -> bool:
    """Whether a linear layer's weight lies [in, out]."""
    return _LINEAR[_name(module)]


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _plain(module: nn.Module) -> bool:
    of = module._parameters
    return set(of) == {"weight", "bias"} and all(p is None or type(p) is nn.Parameter for p in of.values())


def fused(module: nn.Module, x: Tensor, y: Tensor, rows: Rows, examples: int, sink: Sink | None) -> Tensor:
    """The module's output y on x, from which the backward pass forms every example's gradient for the sink.

    Without a sink (a forward run again inside the backward pass) nothing is formed twice.
    """
    into = _Into(sink, module, rows, examples)
    kind = _FusedConvolution if is_convolution(module) else _Fused
    into = _Into(sink, module, rows, examples)
    output: Tensor = kind.apply(y.detach(), x.to(y.dtype), module.weight, module.bias, into)  # type: ignore[no-untyped-call]
    return output


class _Into:
    """What the backward pass needs beside its tensors."""

    def __init__(self, sink: Sink | None, module: nn.Module, rows: Rows, examples: int) -> None:
        self.sink, self.module, self.rows, self.examples = sink, module, rows, examples

    def weight(self, a_NRI: Tensor, b_NRO: Tensor) -> Tensor:
        """The weight's gradient, the sum over the examples; their own go to the sink."""
        weight, sink = self.module.weight, self.sink
        assert isinstance(weight, nn.Parameter)
        assert sink is not None
        left, right = (a_NRI, b_NRO) if turned(self.module) else (b_NRO, a_NRI)
        whole = torch.empty_like(weight.detach())
        for rows in [slice(0, len(weight))] if sink.keeps else _parts(weight, self.examples):
            room = sink.room(weight, rows, b_NRO.dtype)
            g = torch.bmm(left[:, :, rows].transpose(1, 2), right, out=room)
            torch.sum(g, dim=0, dtype=whole.dtype, out=whole[rows])
            sink.take(weight, rows, g)
        return whole

    def bias(self, g_NO: Tensor) -> Tensor:
        """The bias's gradient, of every example's."""
        bias, sink = self.module.bias, self.sink
        assert isinstance(bias, nn.Parameter)
        assert sink is not None
        sink.take(bias, slice(None), g_NO.to(bias.dtype))
        return g_NO.to(bias.dtype).sum(dim=0)


def _wide(b: Tensor) -> torch.dtype:
    """The precision to add up in."""
    return torch.float32 if b.element_size() < 4 else b.dtype


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
    for part in _parts(weight, examples):
        yield weight, part, torch.bmm(left[:, :, part].transpose(1, 2), right)
    if "bias" in parameters:
        yield parameters["bias"], slice(None), b_NRO.sum(dim=1, dtype=parameters["bias"].dtype)


def _parts(p: Tensor, examples: int) -> list[slice]:
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
                to_x = b @ (weight.t() if turned(into.module) else weight).to(b.dtype)
            b_NRO = into.rows.per_example(b, into.examples).view(into.examples, -1, b.shape[-1])
            if needs_weight:
                a_NRI = into.rows.per_example(x, into.examples).view(into.examples, -1, x.shape[-1])
                to_weight = into.weight(a_NRI, b_NRO)
            if needs_bias:
                to_bias = into.bias(b_NRO.sum(dim=1, dtype=_wide(b)))
        return None, to_x, to_weight, to_bias, None


class _FusedConvolution(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, into: _Into) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(x, weight)
        return y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        into: _Into = ctx.into
        module, sink, examples = into.module, into.sink, into.examples
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        to_x = to_weight = to_bias = None
        assert isinstance(module, _CONVOLUTIONS)
        with torch.autocast(b.device.type, enabled=False):
            if needs_x:
                to_x = _to_input(module, x, b, weight.to(b.dtype))
            if needs_weight:
                assert sink is not None
                parameter, entries = module.weight, len(b) // examples
                assert isinstance(parameter, nn.Parameter)
                to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
                # rows of the weight are channels of the output, which belong together in groups
                for rows in (
                    _parts(weight, examples) if module.groups == 1 and not sink.keeps else [slice(0, len(weight))]
                ):
                    room = sink.room(parameter, rows, b.dtype)
                    g = per_example_convolution(module, x, b[:, rows], ("weight",), entries, room)["weight"]
                    torch.sum(g, dim=0, dtype=weight.dtype, out=to_weight[rows])
                    sink.take(parameter, rows, g)
            if needs_bias:
                b_NRO = b.reshape(examples, -1, b.shape[1], b[0, 0].numel())
                to_bias = into.bias(b_NRO.sum(dim=(1, 3), dtype=_wide(b)))
        return None, to_x, to_weight, to_bias, None


def _to_input(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a convolution's input."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        with torch.enable_grad():
            a = x.detach().requires_grad_()
            y = module._conv_forward(a, weight, None)
        (found,) = torch.autograd.grad(y, a, b)
        return found
    found, _, _ = torch.ops.aten.convolution_backward(
        b, x, weight, None, module.stride, module.padding, module.dilation, False, [0] * len(module.stride),
        module.groups, [True, False, False],
    )  # fmt: skip
    return torch.as_tensor(found)
