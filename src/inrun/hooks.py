"""What happens as the gradient of a unit's output arrives in the backward pass: it is kept, or used at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from inrun.captured import Call, Captured, check_version
from inrun.gradient import wide
from inrun.rows import Rows
from inrun.tangent.ghost import Pair, ghost, ghost_bias
from inrun.tangent.per_example import rule_of
from inrun.units import Unit


def on_gradient(output: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Have the hook called with the gradient of the output as it is now, whatever is done to it in place afterwards.

    Work in place on a view (the output of a linear layer on three dimensions is one) takes the view's own hooks away,
    but not those of what it is a view of.
    """
    strides = output.stride()
    order = sorted(range(output.ndim), key=lambda d: -strides[d])
    base, flat = output._base, output.permute(order)
    whole = base is not None and base.numel() == flat.numel() and base.is_contiguous() and flat.is_contiguous()
    if base is None or base.grad_fn is None or not whole:
        output.register_hook(hook)  # type: ignore[no-untyped-call]
        return
    shape, back = flat.shape, sorted(range(output.ndim), key=lambda d: order[d])
    base.register_hook(lambda gradient: hook(gradient.reshape(shape).permute(back)))  # type: ignore[no-untyped-call]


def form(call: Call, captured: Captured) -> Callable[[Tensor], None]:
    """A hook that forms every example's gradients as soon as the output's is there."""

    def hook(gradient: Tensor) -> None:
        rule = rule_of(call)
        assert rule is not None
        call.gradients = [gradient.detach()]
        call.check_inputs()
        if gradient.element_size() < 4:
            captured.formed.coarse |= dict.fromkeys(call.unit.parameters.values(), gradient.dtype)
            call.gradients = [gradient.detach().float()]
        with torch.no_grad(), call.again():
            found = rule(call, captured.examples)
        with torch.autocast(gradient.device.type, enabled=False):
            for name, p in call.unit.parameters.items():
                captured.formed.take(p, slice(None), found[name].to(wide(p.dtype)))
        call.gradients = [None]

    return hook


def watch(pairs: list[Pair], x: Tensor) -> Callable[[Tensor], None]:
    """A hook that collects a unit's input and output gradient."""

    def hook(gradient: Tensor) -> None:
        # the rows are counted: a tensor without entries does not tell how many they are
        a, b = (of.reshape(of.shape[:-1].numel(), of.shape[-1]) for of in (x, gradient.detach()))
        pairs.append((a.to(wide(b.dtype)), b.to(wide(b.dtype))))

    return hook


def pay(unit: Unit, x: Tensor, rows: Rows, captured: Captured) -> Callable[[Tensor], None]:
    """A hook that contracts the examples' gradients with those of the targets, without forming either."""
    version = x._version

    def hook(gradient: Tensor) -> None:
        check_version(unit, x, version)
        N, formed, b = captured.examples, captured.formed, gradient.detach()
        pairs = [of.pairs.get(unit, []) for of in formed.ahead or ()]
        a_NRI, b_NRO = rows.by_features(x, N), rows.by_features(b, N)
        if b.element_size() < 4:
            formed.coarse |= dict.fromkeys(unit.parameters.values(), b.dtype)
            a_NRI, b_NRO = a_NRI.float(), b_NRO.float()
        with torch.autocast(b.device.type, enabled=False):
            formed.pay(unit.parameters["weight"], ghost(a_NRI, b_NRO, pairs))
            if "bias" in unit.parameters:
                formed.pay(unit.parameters["bias"], ghost_bias(b_NRO, pairs))

    return hook


def keep_gradient(call: Call, k: int) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if call.ended:
            return
        kept = call.gradients[k]
        gradient = gradient.detach()
        call.gradients[k] = gradient if kept is None else kept + gradient

    return hook
