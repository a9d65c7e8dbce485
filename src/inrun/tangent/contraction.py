"""<g_i, q> of everything a batch captured, without forming g_i (design, 2.4).

If a unit computes y = f(a; W) in a call, the part of <g_i, q> that goes through this call is <b_i, df(a_i; W)[q]>: the
gradient of example i's rows of the output against the tangent of the output in direction q. The parts of all calls of
all units add up to <g_i, q>, those of shared parameters included, since q is the parameter's.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from inrun.captured import Call, Captured
from inrun.direction import Direction
from inrun.formed import crossed, products, shares
from inrun.gradient import Received, wide
from inrun.parallel import Processes, local
from inrun.tangent.fused import formed_late
from inrun.tangent.generic import NoForwardModeError
from inrun.tangent.per_example import pull_back_each
from inrun.tangent.rules import tangent
from inrun.tangent.twice import NotTwiceDifferentiableError, by_double_backward
from inrun.units import Unit

_Targets = slice | Sequence[int]  # a slice, if it is all of them, costs less
_ALL = slice(None)
_FINE = torch.finfo(torch.float32)


@dataclass
class Block:
    """A batch of the step, and where its values stand among the step's. `tokens` are the parts that came through every
    token, float64 [targets, examples, time] in nats, if the batch is valued by token.
    """

    captured: Captured
    place: slice
    tokens: Tensor | None

    def by_id(self) -> list[Tensor]:
        """Of every value its tokens, [targets, tokens]."""
        if self.tokens is None:
            return []
        tokens, packed = self.tokens.cpu(), self.captured.packed
        return list(tokens.unbind(dim=1)) if packed is None else packed.of_each(tokens)

    def of_values(self, shares: Tensor) -> Tensor:
        """What of shares by example, or by example and token, is whose value."""
        if self.tokens is None:
            return shares
        packed = self.captured.packed
        return shares.sum(dim=-1) if packed is None else packed.per_document(shares)


@dataclass
class Contracted:
    """phi_i by target, float64 [targets, values], in nats: of examples, or of packed documents; and their `total` over
    all processes. The same by `blocks` for tokens, and, if it is asked for, in parts by module, [targets, modules,
    values].

    For the books, by target and group of units, [targets, groups]: what came through the group and the size of its
    parts, zero if nothing did; <G, q>, which it should be, and |G| |q|; and, where half precision was used, what one
    rounding of every number may change.
    """

    values: Tensor
    total: Tensor
    seen: Tensor
    size: Tensor
    expected: Tensor
    lengths: Tensor
    rounding: Tensor
    by_module: Tensor | None
    blocks: list[Block]
    share: float  # what a gradient that is made here counts in the received one

    @classmethod
    def nothing(
        cls, targets: int, batches: Sequence[Captured], groups: int, modules: int, device: torch.device, share: float
    ) -> "Contracted":
        def zeros(*n: int) -> Tensor:
            return torch.zeros(targets, *n, dtype=torch.float64, device=device)

        ends = list(accumulate((batch.valued for batch in batches), initial=0))
        blocks = [
            Block(batch, slice(begin, end), zeros(batch.examples, batch.time or 1) if batch.by_token else None)
            for batch, (begin, end) in zip(batches, pairwise(ends), strict=True)
        ]
        parts = zeros(modules, ends[-1]) if modules else None
        seen, size, expected, lengths, rounding = (zeros(groups) for _ in range(5))
        return cls(zeros(ends[-1]), zeros(), seen, size, expected, lengths, rounding, parts, blocks, share)

    def add(self, shares: Tensor, size: Tensor, group: int, module: int, block: Block, targets: _Targets) -> None:
        """The shares of a block's examples, [targets, examples], or of their tokens, [targets, examples, time], that
        came through a group, and through a module of it.
        """
        if self.share != 1.0:
            shares, size = shares * self.share, size * self.share
        self.seen[targets, group] += shares.flatten(1).sum(dim=-1)
        self.size[targets, group] += size
        if block.tokens is not None:
            block.tokens[targets] += shares
        shares = block.of_values(shares)
        self.values[targets, block.place] += shares
        if self.by_module is not None:
            self.by_module[targets, module, block.place] += shares

    def summed(self, processes: Processes) -> None:
        """Have the books of all processes, with the values of this one."""
        books = torch.stack([self.seen, self.size, self.expected, self.lengths, self.rounding])
        both = processes.total(torch.cat([self.values.sum(dim=1), books.flatten()]))
        self.total = both[: len(self.values)]
        self.seen, self.size, self.expected, self.lengths, self.rounding = both[len(self.values) :].view_as(books)


def contract(
    batches: Sequence[Captured],
    directions: Sequence[Direction],
    scales: Mapping[nn.Parameter, Tensor] | None,
    paid: Mapping[nn.Parameter, Tensor | float],
    received: Received,
    units: Sequence[Unit],
    group_of: Mapping[nn.Parameter, int],
    groups: int,
    module_of: Mapping[nn.Parameter, int],
    processes: Processes,
) -> Contracted:
    """<g_i, q> of a step's batches for the direction q of every target; the books are those of all processes.

    Args:
        scales: g_i as the optimizer receives it over g_i as backward made it, by parameter; it goes over to q.
        paid: by parameter, q over the vector with which its gradients were contracted on the spot (inrun.formed).
        received: the gradient that backward made.
        units: those that may have been called, on all processes in one order.
        group_of: the group that a parameter belongs to, of so many `groups`.
        module_of: the part of the values that it belongs to (inrun.parts); empty if none is asked for.
    """
    device = next(iter(group_of)).device
    modules = max(module_of.values(), default=-1) + 1
    found = Contracted.nothing(len(directions), batches, groups, modules, device, processes.share)
    halves = _precisions(batches, group_of)
    for p, group in group_of.items():
        depending = [k for k, direction in enumerate(directions) if p in direction.vectors]
        if depending:
            towards = depending if len(depending) < len(directions) else _ALL
            factor = _times(directions[depending[0]].factors.get(p), None if scales is None else scales[p])
            kept = [(b.captured.formed.kept[p], b) for b in found.blocks if p in b.captured.formed.kept]
            vectors = [directions[k].vectors[p] for k in depending]
            parts, inner, squares, both = products(
                [g for g, _ in kept], received.made.get(p), vectors, factor, group in halves
            )
            for part, (_, block) in zip(parts, kept, strict=True):
                found.add(part, part.abs().sum(dim=1), group, module_of.get(p, 0), block, towards)
            if p in received.made:
                copies = processes.copies(p)
                found.expected[towards, group] += inner / copies
                found.lengths[towards, group] += squares.sqrt() * received.squares[p].sqrt() / copies
            if group in halves:
                # relative to a number, and of the smallest ones by themselves
                eps, least = halves[group].eps, halves[group].eps * halves[group].smallest_normal
                found.rounding[towards, group] += eps * both.sqrt() + least * squares.sqrt()
                if any(p in batch.formed.coarse for batch in batches) or (p.dtype.itemsize < 4 and len(kept) > 1):
                    # the terms of G were rounded on their way, too
                    q = [_received_q(directions[k], p, scales) for k in depending]
                    for g, _ in kept:
                        found.rounding[towards, group] += eps * crossed(g, q).sqrt() * found.share
    for block in found.blocks:
        formed = block.captured.formed
        for p, with_vectors in formed.paid.items():
            part = with_vectors * paid[p]
            found.add(part, part.abs().sum(dim=1), group_of[p], module_of.get(p, 0), block, _ALL)
            if p in formed.crossed:
                rounding = halves[group_of[p]].eps * formed.crossed[p].sqrt()
                found.rounding[:, group_of[p]] += (rounding * paid[p]).abs()
    calls: dict[Unit, list[tuple[Call, Block]]] = {unit: [] for unit in units}
    for block in found.blocks:
        for call in block.captured.calls:
            calls[call.unit].append((call, block))
    for unit, of in calls.items():
        if of or processes.sharded:  # the others may have some
            _contract_unit(unit, of, directions, scales, group_of, module_of, found, processes)
    processes.reshard()  # the modules inside a unit that was run again have gathered theirs, which are about to move
    found.summed(processes)
    return found


def _precisions(batches: Sequence[Captured], group_of: Mapping[nn.Parameter, int]) -> dict[int, torch.finfo]:
    """By group whose gradients were made in half precision: the coarsest."""
    found: dict[int, torch.finfo] = {}

    def see(p: nn.Parameter, dtype: torch.dtype) -> None:
        if dtype.itemsize < 4:
            found[group_of[p]] = max(found.get(group_of[p], _FINE), torch.finfo(dtype), key=lambda of: of.eps)

    for p in group_of:
        see(p, p.dtype)
    for batch in batches:
        for p, dtype in batch.formed.coarse.items():
            see(p, dtype)
        for call in batch.calls:
            made = [gradient.dtype for gradient in call.gradients if gradient is not None]
            for dtype in (*made, *_inside(call)):
                see(next(iter(call.unit.parameters.values())), dtype)
    return found


def _inside(call: Call) -> list[torch.dtype]:
    """What autocast may have a unit compute in that puts out another dtype; a closed form puts out what it computes."""
    return [] if call.autocast is None or call.unit.closed_form else [call.autocast]


def _times(factor: Tensor | float | None, scale: Tensor | None) -> Tensor | float | None:
    return scale if factor is None else factor if scale is None else factor * scale


def _received_q(direction: Direction, p: nn.Parameter, scales: Mapping[nn.Parameter, Tensor] | None) -> Tensor:
    """The parameter's part of q, for gradients as backward made them."""
    q = direction.q(p)
    return q if scales is None else q * scales[p]


def _contract_unit(
    unit: Unit,
    calls: Sequence[tuple[Call, Block]],
    directions: Sequence[Direction],
    scales: Mapping[nn.Parameter, Tensor] | None,
    group_of: Mapping[nn.Parameter, int],
    module_of: Mapping[nn.Parameter, int],
    found: Contracted,
    processes: Processes,
) -> None:
    """The calls of a unit. Where its weights are sharded, every process gathers the unit's part of every q."""
    parameters = unit.parameters
    group = group_of[next(iter(parameters.values()))]

    def towards(k: int) -> dict[str, Tensor]:
        """The unit's part of a target's q."""
        of = {n: p for n, p in parameters.items() if p in directions[k].vectors}
        return {n: processes.as_met(p, _received_q(directions[k], p, scales)) for n, p in of.items()}

    late = [(call, block) for call, block in calls if call.late]
    again = [(call, block) for call, block in calls if not call.late]
    if late:
        q = [towards(k) for k in range(len(directions))]
        for call, block in late:
            _contract_late(call, block, q, group, module_of, found)
    if not again and not processes.sharded:
        return
    weights = None
    if processes.sharded and not unit.closed_form:
        weights = {n: processes.as_met(p, local(p)) for n, p in unit.module.named_parameters(remove_duplicate=False)}
    for k in range(len(directions)):
        for module, direction in _by_module(towards(k), parameters, module_of):
            for call, block in again:
                mine, size, rounding = _contract_again(call, direction, block.captured, weights)
                found.add(mine[None], size, group, module, block, [k])
                found.rounding[k, group] += rounding * found.share


def _contract_late(
    call: Call,
    block: Block,
    q: Sequence[Mapping[str, Tensor]],
    group: int,
    module_of: Mapping[nn.Parameter, int],
    found: Contracted,
) -> None:
    names = {p: name for name, p in call.unit.parameters.items()}
    for p, rows, g in formed_late(call, block.captured.examples):
        vectors = [of[names[p]][rows] if names[p] in of else torch.zeros_like(p[rows]) for of in q]
        part = shares(g, vectors)
        found.add(part, part.abs().sum(dim=1), group, module_of.get(p, 0), block, _ALL)
        if g.dtype.itemsize < 4:
            found.rounding[:, group] += torch.finfo(g.dtype).eps * crossed(g, vectors).sqrt() * found.share


def _contract_again(
    call: Call, direction: Mapping[str, Tensor], batch: Captured, weights: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """By forward mode, or where an operator has none by a double backward, or by one pull-back per example."""
    if weights is not None:  # in the precision in which the call met them
        own = dict(call.unit.module.named_parameters(remove_duplicate=False))
        weights = {n: x.to(call.met_in.get(own[n], x.dtype)) for n, x in weights.items()}
    try:
        return _contract_tangent(call, direction, batch, partial(tangent, weights=weights))
    except NoForwardModeError:
        if weights is not None:
            raise
    try:
        return _contract_tangent(call, direction, batch, by_double_backward)
    except NotTwiceDifferentiableError:
        if batch.by_token:
            raise
    return _contract_pulled_back(call, direction, batch.examples)


def _by_module(
    direction: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], module_of: Mapping[nn.Parameter, int]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """A direction in parts, by module: the output's tangent is linear in it."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, q in direction.items():
        parts.setdefault(module_of.get(parameters[name], 0), {})[name] = q
    yield from parts.items()


def _contract_tangent(
    call: Call, direction: Mapping[str, Tensor], batch: Captured, tangent_of: Callable[..., Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shares of the examples, or of their tokens, [examples, time]; the size of their parts, and what one rounding
    of every number may change.
    """
    scale = 1.0
    own = call.unit.parameters
    dtypes = {name: call.met_in.get(p, p.dtype) for name, p in own.items()}
    if torch.float16 in (call.autocast, *dtypes.values()):  # it has no numbers as small as q is
        largest = max(float(q.abs().max()) if q.numel() else 0.0 for q in direction.values())
        scale = 2.0 ** -math.frexp(largest)[1] if largest else 1.0
    direction = {name: (q if scale == 1.0 else q * scale).to(dtypes[name]) for name, q in direction.items()}
    args, kwargs = call.inputs()
    with call.again():
        leaves, _ = tree_flatten(tangent_of(call.unit.module, direction, args, kwargs, call.before))
    anew = call.unit.closed_form  # it makes its output so
    N, magnitude, rounding = batch.examples, torch.zeros(()), torch.zeros(())
    shape = (N, batch.time or 1) if batch.by_token else (N,)
    shares = torch.zeros(shape, dtype=torch.float64, device=call.device)
    for k, (towards, rows, gradient, norm) in enumerate(
        zip(leaves, call.rows, call.gradients, call.gradient_norms, strict=True)
    ):
        if gradient is not None and rows is not None:
            # a tangent without the example dimension is the same for all examples: it broadcasts as the output did
            gradient = gradient.to(call.device)
            made = (gradient.dtype, towards.dtype, *_inside(call))
            eps = max((torch.finfo(dtype).eps for dtype in made if dtype.itemsize < 4), default=0.0)
            towards, gradient = towards.to(wide(towards.dtype)), gradient.to(wide(gradient.dtype))
            magnitude = magnitude + norm * towards.expand_as(gradient).norm()
            if anew and towards.shape == gradient.shape and towards.dtype == gradient.dtype:
                product = towards.mul_(gradient)  # new memory of this size costs more than the product
            else:
                product = gradient * towards
            if eps:
                rounding = rounding + eps * product.norm()
            time = call.times[k] if batch.by_token else None
            if time is None or batch.time is None:
                each = rows.per_example(product, N)
            else:
                each = time.per_token(product, rows, N, batch.time)
            shares = shares + each.sum(dim=-1).double()
    return shares / scale, magnitude / scale, rounding / scale


def _contract_pulled_back(call: Call, direction: Mapping[str, Tensor], examples: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a unit without a forward mode: g_i by one pull-back per example, contracted before the next."""
    shares = torch.zeros(examples, dtype=torch.float64, device=call.device)
    squares = torch.zeros(())

    def see(i: int, g: dict[str, Tensor]) -> None:
        nonlocal squares
        for name, gradient in g.items():
            if name in direction:
                product = gradient.to(wide(gradient.dtype)) * direction[name]
                shares[i] += product.sum(dtype=torch.float64)
                squares = squares + product.square().sum()

    with call.again():
        pull_back_each(call, examples, see)
    made = [*call.unit.parameters.values(), *(x for x in call.gradients if x is not None)]
    eps = max((torch.finfo(x.dtype).eps for x in made if x.element_size() < 4), default=0.0)
    return shares, shares.abs().sum(), eps * squares.sqrt()
