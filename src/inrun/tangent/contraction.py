"""<g_i, q> of everything a batch captured, without forming g_i (design, 2.4).

If a unit computes y = f(a; W) in a call, the part of <g_i, q> that goes through this call is <b_i, df(a_i; W)[q]>: the
gradient of example i's rows of the output against the tangent of the output in direction q. The parts of all calls of
all units add up to <g_i, q>, those of shared parameters included, since q is the parameter's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from inrun.captured import Call, Captured
from inrun.formed import shares
from inrun.tangent.fused import formed_late
from inrun.tangent.rules import has_closed_form, tangent

Direction = Mapping[nn.Parameter, Tensor]


@dataclass
class Contracted:
    """phi_i by target, float64 [targets, examples], in nats; and by target and group of units, [targets, groups], what
    came through it, and the size against which its rounding is judged (inrun.books); and the groups of which the
    training's own gradient was summed in half precision.
    """

    values: Tensor
    seen: Tensor
    size: Tensor
    coarse: set[int] = field(default_factory=set)

    @classmethod
    def nothing(cls, targets: int, examples: int, groups: int, device: torch.device) -> "Contracted":
        sizes = ((targets, examples), (targets, groups), (targets, groups))
        values, seen, size = (torch.zeros(size, dtype=torch.float64, device=device) for size in sizes)
        return cls(values, seen, size)

    def add(self, shares: Tensor, size: Tensor, group: int, target: slice | int = slice(None)) -> None:
        self.values[target] += shares
        self.seen[target, group] += shares.sum(dim=-1)
        self.size[target, group] += size


def contract(
    captured: Captured,
    directions: Sequence[Direction],
    factors: Mapping[nn.Parameter, Tensor | float],
    group_of: Mapping[nn.Parameter, int],
    groups: int,
) -> Contracted:
    """<g_i, q> for the direction q of every target.

    Args:
        factors: by parameter, q over the vector with which its gradients were contracted on the spot (inrun.formed).
        group_of: the group that a parameter belongs to, of so many `groups`.
    """
    device = next(iter(group_of)).device
    found = Contracted.nothing(len(directions), captured.examples, groups, device)
    for p, g in captured.formed.kept.items():
        towards = [k for k, q in enumerate(directions) if p in q]
        if towards:
            part = shares(g.to(device), [directions[k][p] for k in towards])
            for k, mine in zip(towards, part, strict=True):
                found.add(mine, mine.abs().sum(), group_of[p], k)
    found.coarse |= {group_of[p] for p in captured.formed.coarse}
    for p, paid in captured.formed.paid.items():
        part = paid * factors[p]
        found.add(part, part.abs().sum(dim=1), group_of[p])
    for call in captured.calls:
        if any(g is not None and g.element_size() < 4 for g in call.gradients):
            found.coarse.add(group_of[next(iter(call.unit.parameters.values()))])
        if call.late:
            for p, rows, g in formed_late(call, captured.examples):
                part = shares(g, [q[p][rows] if p in q else torch.zeros_like(p[rows]) for q in directions])
                found.add(part, part.abs().sum(dim=1), group_of[p])
            continue
        for k, q in enumerate(directions):
            direction = {name: q[p] for name, p in call.unit.parameters.items() if p in q}
            if direction:
                mine, size = _contract_call(call, direction, captured.examples)
                found.add(mine, size, group_of[next(iter(call.unit.parameters.values()))], k)
    return found


def _contract_call(call: Call, direction: Mapping[str, Tensor], examples: int) -> tuple[Tensor, Tensor]:
    device = next(iter(direction.values())).device
    args, kwargs = call.inputs(device)
    with call.again():
        leaves, _ = tree_flatten(tangent(call.unit.module, direction, args, kwargs, call.random_state))
    mine = has_closed_form(call.unit.module)  # it makes its output anew
    shares, magnitude = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for towards, rows, gradient, norm in zip(leaves, call.rows, call.gradients, call.gradient_norms, strict=True):
        if gradient is not None and rows is not None:
            # a tangent without the example dimension is the same for all examples: it broadcasts as the output did
            gradient = gradient.to(device)
            magnitude = magnitude + norm * towards.expand_as(gradient).norm()
            if mine and towards.shape == gradient.shape and towards.dtype == gradient.dtype:
                product = towards.mul_(gradient)  # new memory of this size costs more than the product
            else:
                product = gradient * towards
            shares = shares + rows.per_example(product, examples).sum(dim=1).double()
    return shares, magnitude
