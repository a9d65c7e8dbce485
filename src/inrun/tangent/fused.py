"""Layers that form their weight's gradient example by example, in the backward pass itself (design, 2.4).

A linear layer's weight has the gradient sum_i b_i^T a_i over the examples i. One batched product makes the terms, not
their sum, with no more arithmetic; what each example contributes is then at hand before the sum is, which goes on to
the optimizer. A convolution is the same with patches for rows (inrun.tangent.convolution). The forward pass is the
module's own: its output is taken as it is.

Shapes: N examples, R rows of each, I and O features in and out.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from inrun.captured import Call
from inrun.errors import InrunError
from inrun.formed import EVERYONE
from inrun.gradient import wide
from inrun.rows import Rows
from inrun.tangent.convolution import per_example_convolution
from inrun.tangent.per_example import rows_in_and_out


class Sink(Protocol):
    """Who takes every example's gradients."""

    def room(self, p: nn.Parameter, examples: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """Where to write [examples, *shape] for so many examples and these rows of the parameter."""

    @property
    def keeps(self) -> bool:
        """Whether it keeps what it takes; else it is done with it at once."""

    def take(self, p: nn.Parameter, rows: slice, g: Tensor, examples: slice = EVERYONE) -> None:
        """[examples, *shape] of these examples and rows of the parameter."""


_ROOM = 2**25  # bytes formed at once where they are contracted at once
_SOME = 2**16  # entries of the weight that are added up at once, where their precision changes

# linear layers by the full name of their type: whether the weight lies [in, out]
_LINEAR_TYPES = {"torch.nn.modules.linear.Linear": False, "transformers.pytorch_utils.Conv1D": True}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_linear(module: nn.Module) -> bool:
    """Whether the layer is a linear one of a type that this file knows, with parameters that are plain tensors."""
    return _name(module) in _LINEAR_TYPES and _plain(module)


def is_convolution(module: nn.Module) -> bool:
    return type(module) in _CONVOLUTIONS and _plain(module)


def turned(module: nn.Module) -> bool:
    """Whether a linear layer's weight lies [in, out]."""
    return _LINEAR_TYPES[_name(module)]


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _plain(module: nn.Module) -> bool:
    of = module._parameters
    return set(of) == {"weight", "bias"} and all(p is None or type(p) is nn.Parameter for p in of.values())


def fused(module: nn.Module, x: Tensor, y: Tensor, rows: Rows, examples: int, sink: Sink | None) -> Tensor:
    """The module's output y on x, from which the backward pass forms every example's gradient for the sink.

    Without a sink (a forward run again inside the backward pass) nothing is formed twice.
    """
    layer = (_Convolution if is_convolution(module) else _Linear)(module, rows, examples, sink)
    output: Tensor = _Fused.apply(y.detach(), x.to(y.dtype), module.weight, module.bias, layer)  # type: ignore[no-untyped-call]
    return output


def linear_to_input(b: Tensor, weight: Tensor, turned: bool) -> Tensor:
    """The gradient of a linear layer's input."""
    return b @ (weight.t() if turned else weight)


def parameter_gradients(
    module: nn.Module, x: Tensor, b: Tensor, rows: Rows, examples: int, sink: Sink | None, n: int
) -> list[Tensor]:
    """The gradients of the first n of a linear layer's weight and bias; every example's own go to the sink, if any."""
    if sink is not None:
        layer = _Linear(module, rows, examples, sink)
        return [layer.to_weight(x, b), *([layer.to_bias(b)] if n > 1 else [])]
    a_RI, b_RO = (z.reshape(-1, z.shape[-1]) for z in (x, b))
    left, right = (a_RI, b_RO) if turned(module) else (b_RO, a_RI)
    found = [left.t() @ right, *([b_RO.sum(dim=0)] if n > 1 else [])]
    own = (module._parameters[name] for name in ("weight", "bias"))
    return [g.to(p.dtype) for g, p in zip(found, own, strict=False) if p is not None]


class _Layer(ABC):
    """What the backward pass of one call computes, from its input x and its output's gradient b."""

    def __init__(self, module: nn.Module, rows: Rows, examples: int, sink: Sink | None) -> None:
        self.module, self.rows, self.examples, self.sink = module, rows, examples, sink

    @abstractmethod
    def to_input(self, x: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input."""

    def sides(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """x and b as `of_weight` takes them."""
        return x, b

    @abstractmethod
    def of_weight(self, x: Tensor, b: Tensor, examples: slice, rows: slice, room: Tensor) -> Tensor:
        """The gradient of these examples and these rows of the weight, written to `room`."""

    @abstractmethod
    def of_bias(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        """Every example's gradient of the bias, added up in this precision."""

    @abstractmethod
    def parts(self, weight: nn.Parameter) -> list[tuple[slice, slice]]:
        """The examples and the rows of the weight in parts of a moderate room."""

    def to_weight(self, x: Tensor, b: Tensor) -> Tensor:
        """The weight's gradient, the sum over the examples; their own go to the sink."""
        weight, sink = self.module.weight, self.sink
        assert isinstance(weight, nn.Parameter)
        assert sink is not None
        total = torch.empty_like(weight.detach(), memory_format=torch.contiguous_format)
        x, b = self.sides(x, b)
        whole = [(slice(0, self.examples), slice(0, len(weight)))]
        for some, rows in whole if sink.keeps else self.parts(weight):
            g = self.of_weight(x, b, some, rows, sink.room(weight, some.stop - some.start, rows, b.dtype))
            if some.start == 0:
                _add_up(g, total[rows])
            else:
                total[rows] += g.sum(dim=0, dtype=total.dtype)
            sink.take(weight, rows, g, some)
        return total

    def to_bias(self, b: Tensor) -> Tensor:
        """The bias's gradient; every example's own goes to the sink."""
        bias, sink = self.module.bias, self.sink
        assert isinstance(bias, nn.Parameter)
        assert sink is not None
        g = self.of_bias(b, wide(b.dtype)).to(bias.dtype)
        sink.take(bias, slice(None), g)
        return g.sum(dim=0)


class _Linear(_Layer):
    def to_input(self, x: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return linear_to_input(b, weight, turned(self.module))

    def sides(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows.by_features(x, self.examples), self.rows.by_features(b, self.examples)

    def parts(self, weight: nn.Parameter) -> list[tuple[slice, slice]]:
        everyone = slice(0, self.examples)
        return [(everyone, rows) for rows in _parts(len(weight), self.examples * weight.nbytes)]

    def of_weight(self, x: Tensor, b: Tensor, examples: slice, rows: slice, room: Tensor) -> Tensor:
        return _products(self.module, x, b, rows, room)

    def of_bias(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        return self.rows.by_features(b, self.examples).sum(dim=1, dtype=dtype)


class _Convolution(_Layer):
    def parts(self, weight: nn.Parameter) -> list[tuple[slice, slice]]:
        every_row = slice(0, len(weight))  # channels of the output, which want the same patches of the input
        return [(some, every_row) for some in _parts(self.examples, self.examples * weight.nbytes)]

    def to_input(self, x: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        module = self.module
        assert isinstance(module, _CONVOLUTIONS)
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

    def of_weight(self, x: Tensor, b: Tensor, examples: slice, rows: slice, room: Tensor) -> Tensor:
        module, entries = self.module, len(b) // self.examples
        assert isinstance(module, _CONVOLUTIONS)
        some = slice(examples.start * entries, examples.stop * entries)
        return per_example_convolution(module, x[some], b[some, rows], ("weight",), entries, room)["weight"]

    def of_bias(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        return b.reshape(self.examples, -1, b.shape[1], b[0, 0].numel()).sum(dim=(1, 3), dtype=dtype)


def formed_late(call: Call, examples: int) -> Iterator[tuple[nn.Parameter, slice, Tensor]]:
    """Every example's gradients of a linear layer's call that was kept, in parts: [examples, *shape] of these rows."""
    a_NRI, b_NRO = rows_in_and_out(call, examples)
    parameters = call.unit.parameters
    weight = parameters["weight"]
    for part in _parts(len(weight), examples * weight.nbytes):
        yield weight, part, _products(call.unit.module, a_NRI.to(b_NRO.dtype), b_NRO, part)
    if "bias" in parameters:
        yield parameters["bias"], slice(None), b_NRO.sum(dim=1, dtype=parameters["bias"].dtype)


def _products(module: nn.Module, a_NRI: Tensor, b_NRO: Tensor, rows: slice, room: Tensor | None = None) -> Tensor:
    """Every example's gradient of these rows of a linear layer's weight."""
    left, right = (a_NRI, b_NRO) if turned(module) else (b_NRO, a_NRI)
    return torch.bmm(left[:, :, rows].transpose(1, 2), right, out=room)


def _add_up(g: Tensor, into: Tensor) -> None:
    """Write the sum over the examples, in the precision of what is written to."""
    if g.dtype == into.dtype or g.device.type != "cpu":
        torch.sum(g, dim=0, dtype=into.dtype, out=into)
        return
    # the numbers are converted before they are added up: a few at a time stay in the cache
    for some, there in zip(torch.split(g.flatten(1), _SOME, dim=1), torch.split(into.view(-1), _SOME), strict=True):
        torch.sum(some, dim=0, dtype=into.dtype, out=there)


def _parts(length: int, nbytes: int) -> list[slice]:
    """[0, length) in parts that each take a moderate room, where all of it takes so many bytes."""
    n = max(1, -(-nbytes // _ROOM))
    bounds = [length * k // n for k in range(n + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds) if end > begin]


class _Fused(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return y.detach()  # as neither a view nor the same, what follows may work in place on it

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        layer: _Layer = ctx.layer
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        with torch.no_grad(), torch.autocast(b.device.type, enabled=False):
            to_x = layer.to_input(x, b, weight.to(b.dtype)) if needs_x else None
            to_weight = layer.to_weight(x, b) if needs_weight else None
            to_bias = layer.to_bias(b) if needs_bias else None
        found = (None, to_x, to_weight, to_bias, None)
        if not torch.is_grad_enabled():
            return found
        of = layer.module, b, x, weight
        return tuple(None if g is None else _Once.apply(g, *of) for g in found)  # type: ignore[no-untyped-call]


class _Once(Function):
    """A gradient that cannot be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, module: nn.Module, *of: Tensor) -> Tensor:
        ctx.module = module
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise InrunError(
            f"{ctx.module}: a gradient that came through this layer was differentiated itself inside a `batch` (a "
            "gradient penalty, with create_graph=True). What weights do there does not come through their layers' "
            "outputs, so that no kernel can tell the examples apart. Leave the penalty out, freeze the layers that it "
            "reaches (requires_grad_(False)), or detach() to train on unattributed."
        )
