"""From what a step's batches captured to the step's values: directions, contraction, books."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from inrun.books import Audit, check_conservation, losses_without_data
from inrun.captured import Captured
from inrun.direction import Scheme, Watch
from inrun.errors import InrunError, NonFiniteError
from inrun.formed import Ahead
from inrun.game import Game, play
from inrun.gradient import BY_VALUE, Received
from inrun.packed import Id
from inrun.parallel import Processes
from inrun.parts import Parts
from inrun.piece import Moves
from inrun.step import Microbatch, Step
from inrun.tangent.contraction import contract
from inrun.tangent.per_example import per_example_gradients
from inrun.target import Target, losses
from inrun.units import Units


@dataclass
class Valued:
    """A step's values, and what its rows of the ledger's steps table say so far, by target."""

    step: Step
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)  # before, after momentum, at w + D(0); if audited
    games: dict[str, Game] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)  # by id, of each the values of its own tokens


def train_loss(pending: Sequence[Microbatch]) -> float | None:
    """The sum of the losses that the batches reported; None if one did not."""
    reported = [microbatch.loss for microbatch in pending]
    if any(loss is None for loss in reported):
        return None
    return sum(float(loss) for loss in reported if loss is not None)


def contributions(
    pending: Sequence[Microbatch], scales: Mapping[nn.Parameter, Tensor] | None
) -> dict[nn.Parameter, Tensor]:
    """g_i of every example of the step, as the optimizer receives it: [examples, *shape] by parameter."""
    parts = [per_example_gradients(microbatch.captured) for microbatch in pending]
    found = {}
    for p in dict.fromkeys(p for part in parts for p in part):
        whole = [
            part[p] if p in part else p.new_zeros(microbatch.captured.examples, *p.shape)
            for part, microbatch in zip(parts, pending, strict=True)
        ]
        found[p] = torch.cat(whole)
        if scales is not None:
            found[p] *= scales[p]
    return found


def made_anew(pending: Sequence[Microbatch]) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor]]:
    """The sum of the examples' gradients as backward made them, and of their absolute values, by parameter."""
    whole: dict[nn.Parameter, Tensor] = {}
    sizes: dict[nn.Parameter, Tensor] = {}
    for microbatch in pending:
        for p, g in per_example_gradients(microbatch.captured).items():
            for into, part in ((whole, g.sum(dim=0)), (sizes, g.abs().sum(dim=0))):
                into[p] = into[p] + part if p in into else part
    return whole, sizes


def _in_one(parts: Sequence[Tensor | None]) -> Tensor:
    """The tokens' values of a step's batches, [targets, examples, time], with zeros after shorter sequences."""
    found = [part.cpu() for part in parts if part is not None]
    longest = max(part.shape[-1] for part in found)
    return torch.cat([pad(part, (0, longest - part.shape[-1])) for part in found], dim=1)


class Account:
    """The value of an example is its effect in the step that used it; old momentum has an account of its own."""

    def __init__(
        self,
        targets: Sequence[Target],
        scheme: Scheme,
        units: Units,
        processes: Processes,
        parts: Parts | None = None,
        token_values: bool = False,
    ) -> None:
        self._targets, self._scheme, self._units, self._processes = targets, scheme, units, processes
        self._parts, self._token_values = parts or Parts(), token_values

    def ahead(self, step: int, watch: Watch) -> list[Ahead] | None:
        """What every example's gradient of the step can be contracted with as soon as it is formed, by target."""
        return self._scheme.ahead(self._targets, step, watch)

    def value(
        self,
        step: int,
        pending: Sequence[Microbatch],
        moves: Moves,
        received: Received,
        audited: bool,
        permutations: int,
        seed: int,
    ) -> Valued:
        """The values of the step that the optimizers are about to take. Changes nothing.

        Args:
            audited: measure the target's loss along the step without data, for the books.
            permutations: play the step's game, by this many orders where it is large; 0: do not.

        Raises:
            NonFiniteError: a value is not finite. ConservationError: the books do not balance.
        """
        ids: list[Id] = [i for microbatch in pending for i in microbatch.ids]
        valued = Valued(Step(step, ids, {}, {}, train_loss(pending)))
        if audited:
            valued.losses = losses_without_data(self._targets, step, moves)
        found = self._scheme.directions(self._targets, step, moves)
        paid_at_once = any(microbatch.captured.formed.paid for microbatch in pending)
        scales = received.scales(moves, None if paid_at_once else lambda: made_anew(pending))
        batches, directions = [microbatch.captured for microbatch in pending], list(found.values())
        paid = self._paid(batches, moves, scales)
        called = [call.unit for batch in batches for call in batch.calls]
        groups, group_of = self._units.joined(called)
        through = contract(
            batches,
            directions,
            scales,
            paid,
            received,
            self._units.known(called),
            group_of,
            len(groups),
            self._parts.of,
            self._processes,
        )
        values = through.values.cpu()
        tokens = _in_one([block.tokens for block in through.blocks]) if self._token_values else None
        by_id = [block.by_id() for block in through.blocks] if self._token_values else []
        parts = None if through.by_module is None else through.by_module.cpu()
        for k, (name, direction) in enumerate(found.items()):
            total = float(through.total[k])
            if not math.isfinite(total):
                raise NonFiniteError(f"a value for target {name!r} is not finite")
            where = f"step {step}, target {name!r}"
            seen, size, expected, lengths, rounding = (
                x[k] for x in (through.seen, through.size, through.expected, through.lengths, through.rounding)
            )
            conservation = check_conservation(groups, seen, size, expected, lengths, rounding, where)
            valued.step.values[name], valued.step.losses[name] = values[k], direction.loss
            if tokens is not None:
                valued.step.token_values[name] = tokens[k]
                valued.tokens[name] = [one[k] for block in by_id for one in block]
            if parts is not None:
                valued.step.by_module[name] = dict(zip(self._parts.names, parts[k], strict=True))
            valued.rows[name] = {
                "loss": direction.loss,
                "value": total,
                "conservation": conservation,
                "target_gradients": direction.target_gradients,
            }
        if permutations:
            g = contributions(pending, scales)
            valued.games = play(g, moves, self._targets, step, valued.step.values, permutations, seed)
            for name, game in valued.games.items():
                valued.rows[name] |= game.row()
        return valued

    def _paid(
        self, batches: Sequence[Captured], moves: Moves, scales: Mapping[nn.Parameter, Tensor] | None
    ) -> dict[nn.Parameter, Tensor | float]:
        """q over what gradients were contracted with on the spot, by parameter."""
        factors: dict[nn.Parameter, Tensor | float] = {}
        for p in {p for batch in batches for p in batch.formed.paid}:
            if p not in moves:  # its gradient was taken away: no example moves it
                factors[p] = 0.0
                continue
            rate, scale = moves[p].update.rate(moves[p], 0.0, 1.0), 1.0 if scales is None else scales[p]
            assert rate is not None
            if isinstance(scale, Tensor) and scale.ndim:
                raise InrunError(BY_VALUE)
            factors[p] = rate * scale
        return factors

    def finished(self, valued: Valued, row: Mapping[str, Any]) -> list[Valued]:
        """The steps that are final now that the optimizers have taken this one, their rows complete."""
        step = valued.step
        self._scheme.done(step.step)
        after_step = losses(self._targets, step.step) if valued.losses else [0.0] * len(self._targets)
        for target, after in zip(self._targets, after_step, strict=True):
            found = valued.rows.setdefault(target.name, {})
            found |= {
                "step": step.step,
                "target": target.name,
                "examples": len(step.ids),
                "skipped": step.skipped,
                **row,
            }
            if target.name in valued.losses:
                before, after_momentum, after_zero = valued.losses[target.name]
                found |= Audit(before, after_momentum, after_zero, after).row(found["value"])
        return [valued]

    def close(self) -> list[Valued]:
        """No step waits."""
        return []

    def forget(self) -> None:
        """The weights may have changed otherwise than by a step."""
        self._scheme.forget()

    def state_dict(self) -> dict[str, Any]:
        """The targets' gradients that later steps will use (`refresh`), if any."""
        kept = self._scheme.state_dict()
        return {"refresh": kept} if kept else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self._scheme.load_state_dict(state.get("refresh", {}))

    def first_waiting(self, step: int) -> int:
        """The first step whose values are not final, of a run that has done `step` steps."""
        return step + 1
