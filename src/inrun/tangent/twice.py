"""The tangent of a unit that has no forward mode: its pull-back, differentiated itself.

The pull-back u -> u^T J is linear in u, and the derivative of <u^T J, q> with respect to u is J q. It is exact where
the unit's backward pass is differentiable.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.state import Before
from inrun.tangent.generic import plain_kernels, run_again
from inrun.target import check_twice_differentiable
from inrun.trees import flatten


class NotTwiceDifferentiableError(InrunError):
    """The backward pass of an operator cannot be differentiated."""


def by_double_backward(
    module: nn.Module,
    direction: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: Before | None = None,
) -> list[Any]:
    """The derivative of module(*args, **kwargs) in `direction` of its parameters: by leaf of the output.

    Raises NotTwiceDifferentiableError where the backward pass of one of its operators cannot be differentiated.
    """
    own = dict(module.named_parameters(remove_duplicate=False))  # of a module inside, too
    weights = {name: own[name].detach().requires_grad_() for name in direction}
    with torch.enable_grad(), plain_kernels():
        leaves, _ = flatten(run_again(module, weights, args, kwargs, before))
        outputs = {k: x for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
        covectors = {k: torch.zeros_like(x, requires_grad=True) for k, x in outputs.items()}
        try:
            pulled = torch.autograd.grad(
                list(outputs.values()), list(weights.values()), list(covectors.values()),
                create_graph=True, allow_unused=True,
            )  # fmt: skip
            pairs = [(g, q) for g, q in zip(pulled, direction.values(), strict=True) if g is not None]
            if not pairs or not all(g.requires_grad for g, _ in pairs):
                raise RuntimeError("its backward pass leaves no graph")
            along = torch.stack([(g * q.to(g.dtype)).sum() for g, q in pairs]).sum()
            check_twice_differentiable([along])
            found = torch.autograd.grad(along, list(covectors.values()), allow_unused=True)
        except RuntimeError as error:
            raise NotTwiceDifferentiableError(
                f"{type(module).__name__}: one of its operators has neither a forward-mode derivative nor a backward "
                f"pass that can be differentiated ({error}), so that its tokens have no values of their own. Write a "
                "rule with inrun.tangent.register_tangent, freeze the module (requires_grad_(False)), or ask for "
                "values by example alone."
            ) from error
    tangents = dict(zip(outputs, found, strict=True))
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            tangent = tangents.get(k)
            leaves[k] = torch.zeros_like(leaf) if tangent is None else tangent.detach()
    return leaves
