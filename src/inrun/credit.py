"""momentum="credit": every example is paid its part of every move that its gradient had a share in (design, 2.3).

The move of step t is a linear mix of the gradients so far, D_t = -P_t * (direct_t G_t + through_t B_t) - decay with
B_t = keep_t B_(t-1) + take_t G_t (inrun.update.Mix). With u_t = P_t * grad L, the gradient taken along the straight way
of the real move, from w to w + D_t, the value of an example that step k used is

    <g_i, direct_k u_k + take_k R_k>,    R_k = through_k u_k + keep_(k+1) R_(k+1),

so that the values of a run add up to its whole loss drop, but for decay and for momentum from before it.

g_i is kept until its momentum has died away: until the product of the keeps is below the precision of the weights, or
the run ends. Steps are kept in blocks. A full block has a `tail`, keep_E R_E for the step E after it, which grows with
every later step; when it is complete the recurrence is run backwards through the block, and its values are final.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inrun.books import check_contributions
from inrun.direction import Scheme, Watch, displacements
from inrun.errors import InrunError, NonFiniteError
from inrun.gradient import Received, wide
from inrun.packed import Id
from inrun.piece import Moves
from inrun.scratch import Kept, Key, Scratch, gib, size_of
from inrun.step import Microbatch, Step
from inrun.target import Target, losses
from inrun.units import Units
from inrun.update import Mix, Moved, SGDUpdate, Update
from inrun.valuation import Valued, contributions, made_anew, train_loss

BLOCK = 16  # steps: a larger block is kept longer, a smaller one has more tails to add to


class _Coefficients(NamedTuple):
    """What a step does to the momentum of one parameter."""

    keep: float
    take: float
    through: float
    direct: float


@dataclass
class _Past:
    """A step whose momentum lives: `kept` holds u by (target, parameter's name), and g, [examples, *shape], by (None,
    parameter's name).
    """

    valued: Valued
    kept: Kept
    coefficients: dict[str, _Coefficients]

    def g(self) -> dict[str, Tensor]:
        return {name: x for (target, name), x in self.kept.tensors.items() if target is None}


@dataclass
class _Block:
    """Consecutive steps, and what the steps after them add: by target and parameter, and by parameter."""

    steps: list[_Past] = field(default_factory=list)
    tail: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reach: dict[str, float] = field(default_factory=dict)

    def add(self, past: _Past, targets: Sequence[str]) -> None:
        """Let a later step's move reach back into this block."""
        for name, c in past.coefficients.items():
            self.reach[name] = self.reach.get(name, 1.0) * c.keep
            for target in targets:
                u = past.kept.tensors.get((target, name))
                if u is not None:
                    tail = self.tail.setdefault(target, {})
                    share = c.through * self.reach[name]
                    tail[name] = tail[name].add_(u, alpha=share) if name in tail else u * share

    def dead(self) -> bool:
        """Whether what later steps would add is below the precision of what they added."""
        return all(self.reach.get(name, 1.0) <= _precision(x) for past in self.steps for name, x in past.g().items())

    def settle(self, targets: Sequence[str]) -> list[Valued]:
        """The values of the block's steps, newest first inside, oldest first returned."""
        behind = {target: dict(self.tail.get(target, {})) for target in targets}  # keep R of the step after
        for past in reversed(self.steps):
            g, values = past.g(), past.valued.step.values
            for target in targets:
                total = torch.zeros(len(past.valued.step.ids), dtype=torch.float64)
                for name in dict.fromkeys([*g, *behind[target]]):
                    c = past.coefficients.get(name)
                    if c is None:  # not moved in this step: what lies behind reaches further back as it is
                        continue
                    u, reach = past.kept.tensors.get((target, name)), behind[target].get(name)
                    if u is None and reach is None:
                        continue
                    zero = torch.zeros(()) if u is None else u
                    r = c.through * zero if reach is None else reach + c.through * zero
                    if name in g:
                        towards = c.direct * zero + c.take * r
                        dtype = wide(g[name].dtype)
                        total += (g[name].flatten(1).to(dtype) @ towards.flatten().to(dtype)).double()
                    behind[target][name] = c.keep * r
                if not bool(total.isfinite().all()):
                    raise NonFiniteError(f"step {past.valued.step.step}: a value for target {target!r} is not finite")
                values[target] = total
        return [past.valued for past in self.steps]


class Credit:
    """Values that wait for the momentum of their step to die away; the counterpart of inrun.valuation.Account."""

    def __init__(
        self,
        targets: Sequence[Target],
        scheme: Scheme,
        units: Units,
        names: Mapping[nn.Parameter, str],
        updates: Sequence[Update],
        scratch: Scratch,
    ) -> None:
        for update in updates:
            if type(update).mix is Update.mix:
                raise InrunError(
                    "momentum='credit' is for optimizers whose move is a linear mix of past gradients: SGD, Adam and "
                    f"AdamW; not for {type(update).__name__.removesuffix('Update')}. Use momentum='account'."
                )
        self._targets, self._scheme, self._units, self._names = targets, scheme, units, names
        self._scratch = scratch
        self._of = [target.name for target in targets]
        self._blocks: list[_Block] = [_Block()]
        self._waiting: _Past | None = None
        self._before: dict[str, float] = {}
        # the parts of the momentum that are no example's: from before the first step, and made by coupled decay
        self._old: dict[str, Tensor] = {}
        self._decayed: dict[str, Tensor] = {}
        self._next = self._old, self._decayed  # after the step that is about to be taken

    def ahead(self, step: int, watch: Watch) -> None:
        """Nothing: contributions are kept."""

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
        """Keep the contributions of the step that the optimizers are about to take, and book what its move removes.

        Raises:
            InrunError: there is no room for the contributions; or a game was asked for, which is one step's.
            NonFiniteError: a gradient is not finite. ConservationError: the contributions are not the gradient's.
        """
        if permutations:
            raise InrunError(
                "the game of a step values what the step does by itself: it says nothing of momentum='credit'. Audit "
                "the books with audit_every= alone."
            )
        ids: list[Id] = [i for microbatch in pending for i in microbatch.ids]
        valued = Valued(Step(step, ids, {}, {}, train_loss(pending)))
        self._before = dict(zip(self._of, losses(self._targets, step), strict=True)) if audited else {}
        g = contributions(pending, received.scales(moves, lambda: made_anew(pending)))
        conservation = check_contributions(self._units.groups, g, moves, _cast(pending), f"step {step}")
        mixes = {p: moved.update.mix(moved) for p, moved in moves.items()}
        moved_by = displacements(moves, 1.0)
        # the straight way of the real move is that of plain SGD on the gradient -D
        straight = {p: Moved(moves[p].weight, -move, {}, _STRAIGHT, _SGD) for p, move in moved_by.items()}
        found = self._scheme.directions(self._targets, step, straight)
        keeping: dict[Key, Tensor] = {(None, self._names[p]): x for p, x in g.items()}
        self._next = dict(self._old), dict(self._decayed)
        parts = {p: self._not_of_examples(self._names[p], mix) for p, mix in mixes.items()}
        for target, direction in found.items():
            total = momentum = decay = 0.0
            for p in direction.vectors:
                gradient = direction.q(p)
                mix, (old, decayed) = mixes[p], parts[p]
                total -= _dot(gradient, moved_by[p])
                momentum += _dot(gradient, old)
                decay += _dot(gradient, decayed)
                u = gradient * (mix.sign * mix.scale)
                keeping[target, self._names[p]] = u if u.dtype == torch.float64 else u.float()
            if not math.isfinite(total):
                raise NonFiniteError(f"the gradient of target {target!r} is not finite")
            valued.step.losses[target] = direction.loss
            valued.rows[target] = {
                "loss": direction.loss,
                "value": total - momentum - decay,
                "momentum": momentum,
                "decay": decay,
                "conservation": conservation,
                "target_gradients": direction.target_gradients,
            }
        coefficients = {
            self._names[p]: _Coefficients(mix.keep, mix.take, mix.through, mix.direct) for p, mix in mixes.items()
        }
        if self._waiting is not None:  # a step that was evaluated and never taken
            self._scratch.drop(self._waiting.kept)
        elif not self._old:
            self._refuse_without_room(size_of(keeping.values()), coefficients)
        self._waiting = _Past(valued, self._scratch.put(keeping), coefficients)
        return valued

    def finished(self, valued: Valued, row: Mapping[str, Any]) -> list[Valued]:
        """The steps that are final now that the optimizers have taken this one."""
        past, self._waiting = self._waiting, None
        if past is None or past.valued is not valued:
            raise AssertionError("a step was finished that was not the last one valued")
        step = valued.step
        after_step = losses(self._targets, step.step) if self._before else [0.0] * len(self._targets)
        for target, after in zip(self._targets, after_step, strict=True):
            found = valued.rows[target.name]
            found |= {"step": step.step, "target": target.name, "examples": len(step.ids), "skipped": False, **row}
            if target.name in self._before:
                before = self._before[target.name]
                explained = found["value"] + found["momentum"] + found["decay"]
                found |= {"loss_before": before, "loss_after": after, "unexplained": before - after - explained}
        self._before = {}
        self._old, self._decayed = self._next
        for block in self._blocks[:-1]:
            block.add(past, self._of)
        self._blocks[-1].steps.append(past)
        if len(self._blocks[-1].steps) == BLOCK:
            self._blocks.append(_Block())
        final = []
        while len(self._blocks) > 1 and self._blocks[0].dead():
            final += self._settle(self._blocks.pop(0))
        return final

    def close(self) -> list[Valued]:
        """The run ends here: the values of all steps that still waited."""
        blocks, self._blocks = self._blocks, [_Block()]
        return [valued for block in blocks for valued in self._settle(block)]

    def _settle(self, block: _Block) -> list[Valued]:
        final = block.settle(self._of)
        self._drop(block)
        return final

    def _drop(self, block: _Block) -> None:
        for past in block.steps:
            self._scratch.drop(past.kept)

    def _not_of_examples(self, name: str, mix: Mix) -> tuple[Tensor, Tensor]:
        """What of the way back, -D, is made by momentum from before the first step, and by weight decay."""
        old = self._old.get(name, mix.before)
        decayed = self._decayed.get(name, _ZERO)
        decayed = mix.keep * decayed + mix.take * _or_zero(mix.decay)
        old = mix.keep * _or_zero(old)
        self._next[0][name], self._next[1][name] = old, decayed
        by_decay = mix.scale * (mix.direct * _or_zero(mix.decay) + mix.through * decayed) + _or_zero(mix.pull)
        return mix.scale * mix.through * old, by_decay

    def _refuse_without_room(self, size: int, coefficients: Mapping[str, _Coefficients]) -> None:
        """Raise InrunError, with the figures, if the steps whose momentum lives will not fit."""
        keep = max(c.keep for c in coefficients.values())
        alive = 1 if keep == 0 else math.inf if keep >= 1 else math.log(torch.finfo(torch.float32).eps) / math.log(keep)
        need, room = size * (alive + 2 * BLOCK), self._scratch.room()
        if need > room:
            raise InrunError(
                f"momentum='credit' keeps every example's gradient until its momentum has died away, about "
                f"{alive + 2 * BLOCK:.0f} steps of {gib(size)}: {gib(need)}. There are {gib(room)}: memory= allows "
                f"{gib(self._scratch.budget)}, and the rest is free in {self._scratch.folder}. Train fewer parameters "
                "(adapters), take smaller batches, make room, or use momentum='account'."
            )

    def forget(self) -> None:
        """Nothing of a target is kept."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that waits, as plain values and tensors."""
        return {
            "old": dict(self._old),
            "decayed": dict(self._decayed),
            "blocks": [
                {
                    "reach": dict(block.reach),
                    "tail": {target: {n: x.clone() for n, x in of.items()} for target, of in block.tail.items()},
                    "steps": [_stored(past) for past in block.steps],
                }
                for block in self._blocks
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Wait for what another run's `state_dict` waited for."""
        if state["step"] == 0:
            state = _NOTHING
        if "blocks" not in state:
            raise InrunError(
                "this checkpoint does not hold the contributions that momentum='credit' must go on with: it was taken "
                "under momentum='account', or its state_dict() was not stored whole."
            )
        for block in self._blocks:
            self._drop(block)
        self._old, self._decayed = dict(state["old"]), dict(state["decayed"])
        self._blocks = [
            _Block([self._restored(past) for past in block["steps"]], block["tail"], block["reach"])
            for block in state["blocks"]
        ] or [_Block()]

    def first_waiting(self, step: int) -> int:
        """The first step whose values are not final, of a run that has done `step` steps."""
        return next((past.valued.step.step for block in self._blocks for past in block.steps), step + 1)

    def _restored(self, state: Mapping[str, Any]) -> _Past:
        kept: dict[Key, Tensor] = {(None, name): x for name, x in state["g"].items()}
        kept |= {(target, name): x for target, of in state["u"].items() for name, x in of.items()}
        step = Step(state["step"], list(state["ids"]), {}, dict(state["losses"]), state["train_loss"])
        coefficients = {name: _Coefficients(*numbers) for name, numbers in state["coefficients"].items()}
        return _Past(Valued(step, state["rows"]), self._scratch.put(kept), coefficients)


_SGD = SGDUpdate()
_STRAIGHT = {"lr": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "maximize": False}
_ZERO = torch.zeros(())
_NOTHING: dict[str, Any] = {"old": {}, "decayed": {}, "blocks": []}


def _stored(past: _Past) -> dict[str, Any]:
    """The counterpart of `Credit._restored`."""
    u: dict[str, dict[str, Tensor]] = {}
    for (target, name), x in past.kept.tensors.items():
        if target is not None:
            u.setdefault(target, {})[name] = x
    step = past.valued.step
    return {
        "step": step.step,
        "ids": step.ids,
        "losses": step.losses,
        "train_loss": step.train_loss,
        "rows": past.valued.rows,
        "g": past.g(),
        "u": u,
        "coefficients": {name: list(numbers) for name, numbers in past.coefficients.items()},
    }


def _cast(pending: Sequence[Microbatch]) -> bool:
    """Whether a forward pass was under autocast."""
    return any(microbatch.captured.cast for microbatch in pending)


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.sum(x * y, dtype=torch.float64))


def _or_zero(x: Tensor | None) -> Tensor:
    return _ZERO if x is None else x


def _precision(x: Tensor) -> float:
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
