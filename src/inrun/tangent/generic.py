"""The generic rule: forward-mode differentiation of one module with respect to its own parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.backends import cudnn, mkldnn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from inrun.errors import InrunError


class NoForwardModeError(InrunError):
    """An operator of a module has no forward-mode derivative."""


@dataclass(frozen=True)
class RandomState:
    """The generators that a module may draw from, as they were before a call."""

    cpu: Tensor
    devices: dict[int, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> "RandomState":
        devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
        return cls(torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices})

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The generators set to this state inside the block, and back to where they were after it."""
        with torch.random.fork_rng(devices=list(self.devices)):
            torch.set_rng_state(self.cpu)
            for device, state in self.devices.items():
                torch.cuda.set_rng_state(state, device)
            yield


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


def run_again(module: nn.Module, own: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's output with these tensors for its own parameters; buffers that its forward changes are copies."""
    swapped = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, {**swapped, **own}, args, kwargs, tie_weights=False)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention and recurrent layers in the form that has a forward mode and a double backward."""
    with sdpa_kernel(SDPBackend.MATH), cudnn.flags(enabled=False), _without_mkldnn():
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


def forward_mode(
    module: nn.Module,
    direction: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    random_state: RandomState | None = None,
) -> Any:
    """J(args) direction by running the module again on dual numbers: exact for any differentiable module.

    The random state of the first run is replayed, buffers that the forward changes are copies, attention and recurrent
    layers run in their plain form, which has forward mode. Raises NoForwardModeError where an operator has none.
    """
    own = dict(module.named_parameters(remove_duplicate=False))  # of a module inside, too
    replayed = random_state.replayed() if random_state is not None else nullcontext()
    with torch.no_grad(), plain_kernels(), replayed, forward_ad.dual_level():
        duals: dict[str, Tensor] = {}
        for name, towards in direction.items():
            parameter = own[name].detach()
            duals[name] = forward_ad.make_dual(parameter, towards.to(parameter.dtype))  # type: ignore[no-untyped-call]
        try:
            output = run_again(module, duals, args, kwargs)
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

        return tree_map(tangent_of, output)
