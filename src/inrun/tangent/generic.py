"""The generic rule: forward-mode differentiation of one module with respect to its own parameters."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.backends import cudnn, mkldnn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from inrun.errors import InrunError
from inrun.parallel import is_sharded
from inrun.state import Before, State
from inrun.trees import flatten


class NoForwardModeError(InrunError):
    """An operator of a module has no forward-mode derivative."""


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module in the mode that a call was made in; it may have been set to the other since."""
    if module.training == training:
        yield
        return
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def run_again(
    module: nn.Module,
    own: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: Before | None = None,
) -> Any:
    """The module's output with these tensors for parameters of its own or of modules inside it.

    What its forward draws and finds is as `before`, if that is given; what it changes, buffers and attributes, is lost.
    """
    again = before.again(module) if before is not None else State(module).copied()
    with again, _given(module):
        return functional_call(module, dict(own), args, kwargs, tie_weights=False)


@contextmanager
def _given(module: nn.Module) -> Iterator[None]:
    """Inside the block the module takes its arguments as they are: what its hooks made of them once. Those that gather
    the weights of a sharded module, which are given, do not run.
    """
    kept, after = module._forward_pre_hooks, module._forward_hooks

    def without_result(hook: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            hook(*args)

        return call

    sharded = is_sharded(module)
    hooks = [] if sharded else [(key, without_result(hook)) for key, hook in kept.items()]
    module._forward_pre_hooks = type(kept)(hooks)
    if sharded:
        module._forward_hooks = type(after)()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = kept, after


@contextmanager
def plain_kernels(recurrent: bool = True) -> Iterator[None]:
    """Attention and recurrent layers in the form that has a forward mode and a double backward.

    `recurrent`: whether there are such layers. Without libraries for them convolutions, too, are slower and round
    otherwise.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(cudnn.flags(enabled=False))
            stack.enter_context(_without_mkldnn())
        yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Its recurrent layers have no forward mode; mkldnn.flags() would also set what warns on some builds."""
    enabled = mkldnn.enabled
    mkldnn.set_flags(_enabled=False, _fp32_precision=None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)  # type: ignore[no-untyped-call]


def as_looked_up(q: Tensor, ids: Tensor, padding: int | None, by_frequency: bool) -> Tensor:
    """q for an embedding's weight, whose gradient is not quite that of looking it up."""
    if by_frequency:  # each row's gradient is divided by how often it was looked up in the call
        q = q / torch.bincount(ids.flatten(), minlength=len(q)).clamp(min=1)[:, None].to(q.dtype)
    if padding is not None:
        q = q.clone()
        q[padding] = 0  # the padding row receives no gradient, so it moves nothing
    return q


def _is_special(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and (module.padding_idx is not None or module.scale_grad_by_freq)


class _Embeddings(TorchFunctionMode):
    """Inside the block an embedding's tangent is what belongs to its gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        return func(*args, **kwargs)


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    by_frequency = bool(args[2] if len(args) > 2 else kwargs.get("scale_grad_by_freq"))
    primal, towards = forward_ad.unpack_dual(weight)  # type: ignore[no-untyped-call]
    if towards is not None and (padding_idx is not None or by_frequency):
        towards = as_looked_up(towards, input, padding_idx, by_frequency)
        weight = forward_ad.make_dual(primal, towards)  # type: ignore[no-untyped-call]
    return functional.embedding(input, weight, padding_idx, *args, **kwargs)


def forward_mode(
    module: nn.Module,
    direction: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: Before | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """J(args) direction by running the module again on dual numbers: exact for any differentiable module.

    Of an output that is not a tensor, the list of its leaves' tangents, None for what has none.

    It finds what the first run did (`before`), and attention and recurrent layers run in their plain form, which has a
    forward mode. `weights` are all of the module's parameters, where it does not hold them whole. Raises
    NoForwardModeError where an operator has none.
    """
    own: Mapping[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))  # of a module inside, too
    if weights is not None:
        own = weights
    with torch.no_grad(), plain_kernels(), forward_ad.dual_level():
        duals: dict[str, Tensor] = dict(weights or {})
        for name, towards in direction.items():
            parameter = own[name].detach()
            duals[name] = forward_ad.make_dual(parameter, towards.to(parameter.dtype))  # type: ignore[no-untyped-call]
        try:
            with _Embeddings() if any(map(_is_special, module.modules())) else nullcontext():
                output = run_again(module, duals, args, kwargs, before)
        except NotImplementedError as error:
            raise NoForwardModeError(
                f"{type(module).__name__}: one of its operators has no forward-mode derivative ({error}). Write a rule "
                "with inrun.tangent.register_tangent, or freeze the module (requires_grad_(False))."
            ) from error

        def tangent_of(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return None
            primal, towards = forward_ad.unpack_dual(leaf)  # type: ignore[no-untyped-call]
            return torch.zeros_like(primal) if towards is None else towards

        # a structure of someone's own may not take tangents for its tensors
        return tangent_of(output) if isinstance(output, Tensor) else [tangent_of(x) for x in flatten(output)[0]]
