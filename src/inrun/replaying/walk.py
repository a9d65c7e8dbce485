"""From the last step of a recorded run to its first: the run is repeated in segments, and each gone through backwards.

A segment lies between two checkpoints. What its steps found is kept on the host, if that fits there; if not, the
segment is repeated in pieces, the last piece first.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from inrun.errors import InrunError
from inrun.gradient import wide
from inrun.replaying.adjoint import Adjoint, Clip, step_back
from inrun.replaying.book import Walk
from inrun.replaying.passes import Passes
from inrun.replaying.trajectory import Found, Trajectory
from inrun.target import Target, gradients

# steps gone back, those that are only repeated so far counting a part each; of so many; and the training loss there
Progress = Callable[[float, int, float | None], None]
_REPEATED = 0.25
_SAVE_EVERY = 60.0  # seconds
_SAVE_ROWS = 500_000
_COARSE = 0.1  # of a Hessian-vector product may be its error
_ROUGH = 1e3  # times the adjoint may grow before its first-order values are doubtful


def steps_back(
    trajectory: Trajectory, first: int, last: int, room: int, tell: Callable[[int, float | None], None]
) -> Iterator[Found]:
    """The steps from `last` down to the one after `first`, the trajectory standing after `first`.

    Args:
        room: how many steps' `Found` fit on the host.
        tell: called after every step that is repeated, with how many wait to be gone back through, and its loss.
    """
    steps = last - first
    if steps <= max(room, 1):
        kept: list[Found] = []
        for _ in range(steps):
            kept.append(trajectory.take())
            tell(len(kept), kept[-1].line.loss)
        if last in trajectory.record.checkpoints():
            trajectory.check_arrived()
        while kept:
            yield kept.pop()
        return
    half = max(room // 2, 1)
    pieces = min(math.ceil(steps / half), max(half, 2))
    ends = [first + round(k * steps / pieces) for k in range(pieces + 1)]
    starts = [trajectory.snapshot()]
    while trajectory.step < ends[-2]:
        trajectory.take()
        if trajectory.step in ends:
            starts.append(trajectory.snapshot())
    for begin, end in reversed(list(pairwise(ends))):
        trajectory.restore(starts.pop())
        yield from steps_back(trajectory, begin, end, half, tell)


class Backwards:
    """One replay, from the last step of the run, or where it was stopped, to the first."""

    def __init__(
        self,
        trajectory: Trajectory,
        passes: Passes,
        walk: Walk,
        targets: Sequence[Target],
        horizon: float | None,
        room: int,
        progress: Progress,
    ) -> None:
        """`targets`: of which each loss is the mean over all batches."""
        self._trajectory, self._passes, self._walk, self._progress = trajectory, passes, walk, progress
        self._names, self._room, self._ends = trajectory.names, room, targets
        about = trajectory.record.about
        self._clip = Clip(about["clip_norm"], about["clip_value"])
        self._rho = 1.0 if horizon is None else horizon / (1 + horizon)
        self._on_the_way = [target.in_rotation() for target in targets]
        self._losses: list[float] = []
        self._largest: list[tuple[float, int]] = []  # of the adjoint's norm, by target, and the step that it is at
        self._at_end: list[float] = []
        self._hessian_error = 0.0
        self._gone = 0

    def go(self) -> dict[str, object]:
        """Go back to the beginning. Returns what is to be told of the replay: how its Hessian was had, its error, and
        how the adjoint grew.
        """
        trajectory, record, walk = self._trajectory, self._trajectory.record, self._walk
        resumed = walk.resumed()
        if resumed is None:
            trajectory.to_end()
            step, adjoint = record.steps, self._adjoint(self._ends, record.steps)
            self._at_end = adjoint.norms().tolist()
            self._largest = [(norm, record.steps) for norm in self._at_end]
        else:
            step, tensors, told = resumed
            adjoint = Adjoint.of(tensors, self._names)
            self._losses, self._at_end, self._hessian_error = told["losses"], told["at_end"], told["hessian_error"]
            self._largest = [(norm, at) for norm, at in told["largest"]]
            self._passes.hessian = told["hessian"]
        saved, self._gone = time.monotonic(), record.steps - step
        while step > 0:
            first = max(at for at in record.checkpoints() if at < step)
            trajectory.begin(first)
            measured = True  # once in a segment
            for found in steps_back(trajectory, first, step, self._room, self._tell):
                self._back(found, adjoint, measured)
                step, measured = found.line.step - 1, False
                self._gone = record.steps - step
                self._tell(step - first, found.line.loss)
                if step == 0 or time.monotonic() - saved > _SAVE_EVERY or walk.rows > _SAVE_ROWS:
                    self._save(step, adjoint)
                    saved = time.monotonic()
        self._warn()
        return self._told()

    def _tell(self, waiting: int, loss: float | None) -> None:
        """`waiting`: steps that are repeated, but not gone back through."""
        self._progress(self._gone + _REPEATED * waiting, self._trajectory.record.steps, loss)

    def _adjoint(self, targets: Sequence[Target], step: int) -> Adjoint:
        """The targets' gradients at the weights as they are."""
        parameters = list(self._names)
        found = gradients(targets, step, parameters)
        if not self._losses:
            self._losses = [loss for loss, _ in found]

        def of(k: int, g: Tensor | None) -> Tensor:
            p = parameters[k]
            return torch.zeros_like(p, dtype=wide(p.dtype)) if g is None else g.to(wide(p.dtype))

        stacked = {p: torch.stack([of(k, gs[k]) for _, gs in found]).detach() for k, p in enumerate(parameters)}
        return Adjoint({p: x.contiguous() for p, x in stacked.items()})

    def _back(self, found: Found, adjoint: Adjoint, measured: bool) -> None:
        """One step: its values, and the adjoint as it was before it."""
        trajectory, step, rho = self._trajectory, found.line.step, self._rho
        norms = adjoint.norms().tolist()
        if not all(map(math.isfinite, norms)):
            raise InrunError(
                f"the adjoint after step {step} is not finite: the run is too rough there for a replay to go back "
                f"through it. {self._suggestion()}"
            )
        self._largest = [max(was, (norm, step)) for was, norm in zip(self._largest, norms, strict=True)]
        with trajectory.before(found):
            moves = trajectory.moves(found)
            with torch.no_grad():
                gamma = step_back(adjoint, moves, self._clip)
            for p in found.drifting:  # which no example moves
                del moves[p], gamma[p]
            passed = self._passes.go(step, moves, gamma, curved=rho > 0 and step > 1, measured=measured)
            for p, x in passed.hessian.items():
                adjoint.weights[p] += x
            if rho < 1:
                trajectory.restore_buffers()
                adjoint.scale(rho)
                if step > 1:
                    for p, x in self._adjoint(self._on_the_way, step - 1).weights.items():
                        adjoint.weights[p].add_(x, alpha=1 - rho)
        self._hessian_error = max(self._hessian_error, passed.error or 0.0)
        rate = max(group["lr"] for groups in found.line.groups for group in groups)
        rows = {
            target.name: {
                "loss": self._losses[k],
                "value": passed.rows[target.name]["value"],
                "conservation": passed.rows[target.name]["conservation"],
                "train_loss": found.line.loss,
                "learning_rate": rate,
                "adjoint": norms[k],
                "hessian_error": passed.error,
                "target_gradients": int(rho < 1),
            }
            for k, target in enumerate(self._ends)
        }
        self._walk.add(passed.step, rows)

    def _save(self, step: int, adjoint: Adjoint) -> None:
        self._walk.save(step, adjoint.named(self._names), self._told())

    def _told(self) -> dict[str, object]:
        return {
            "losses": self._losses,
            "at_end": self._at_end,
            "largest": self._largest,
            "hessian": self._passes.hessian,
            "hessian_error": self._hessian_error,
        }

    def _warn(self) -> None:
        """Say so if the run was too rough, or its Hessian too coarse."""
        if self._hessian_error > _COARSE:
            warnings.warn(
                f"the Hessian of the batches' loss, by differences of gradients, is off by up to "
                f"{self._hessian_error:.0%} (kinks, as of ReLU, or half precision make it so), and with it the values "
                'of the steps before: take hessian="double" if the model has it, or look at horizon=0, which needs no '
                "Hessian.",
                stacklevel=2,
            )
        for target, end, (norm, step) in zip(self._ends, self._at_end, self._largest, strict=True):
            if norm > _ROUGH * end:
                warnings.warn(
                    f"target {target.name!r}: what a small change of the weights does to its loss at the end grows "
                    f"from {end:.3g} after the last step to {norm:.3g} after step {step}, going back. Values are to "
                    "first order in an example's weight, which means little for steps before that. "
                    f"{self._suggestion()}",
                    stacklevel=2,
                )

    def _suggestion(self) -> str:
        """A horizon under which the adjoint would not grow."""
        steps = self._trajectory.record.steps
        growths = [
            (norm / end) ** (1 / (steps - at))
            for end, (norm, at) in zip(self._at_end, self._largest, strict=True)
            if at < steps and end and norm > end
        ]
        if not growths:
            return "Try horizon=."
        return f"Try horizon={max(1, round(0.5 / (max(growths) - 1)))}."
