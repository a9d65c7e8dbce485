"""<g_i, q> of everything a batch captured, without forming g_i (design, 2.4).

If a unit computes y = f(a; W) in a call, the part of <g_i, q> that goes through this call is <b_i, df(a_i; W)[q]>: the
gradient of example i's rows of the output against the tangent of the output in direction q. The parts of all calls of
all units add up to <g_i, q>, those of shared parameters included, since q is the parameter's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from inrun.capture import Call, Captured
from inrun.probe import Unit
from inrun.tangent.generic import in_mode
from inrun.tangent.rules import tangent


def contract(
    captured: Captured,
    q: Mapping[nn.Parameter, Tensor],
    group_of: Mapping[Unit, int],
    seen: Tensor,
    size: Tensor,
) -> Tensor:
    """phi_i = <g_i, q>: float64 [examples], in nats.

    Adds to `seen` [groups] what came through every group of units, and to `size` [groups] the |b| |tangent| against
    which its rounding is judged (inrun.books).
    """
    values = torch.zeros(captured.examples, dtype=torch.float64, device=seen.device)
    for call in captured.calls:
        direction = {name: q[p] for name, p in call.unit.parameters.items() if p in q}
        if direction:
            shares, magnitude = _contract_call(call, direction, captured.examples)
            values += shares
            seen[group_of[call.unit]] += shares.sum()
            size[group_of[call.unit]] += magnitude
    return values


def _contract_call(call: Call, direction: Mapping[str, Tensor], examples: int) -> tuple[Tensor, Tensor]:
    with in_mode(call.unit.module, call.training):
        leaves, _ = tree_flatten(tangent(call.unit.module, direction, call.args, call.kwargs, call.random_state))
    shares, magnitude = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for towards, rows, gradient, norm in zip(leaves, call.rows, call.gradients, call.gradient_norms, strict=True):
        if gradient is not None and rows is not None:
            # a tangent without the example dimension is the same for all examples: it broadcasts as the output did
            towards = towards.expand_as(gradient)
            shares = shares + rows.per_example(gradient * towards, examples).sum(dim=1).double()
            magnitude = magnitude + norm * towards.norm()
    return shares, magnitude
