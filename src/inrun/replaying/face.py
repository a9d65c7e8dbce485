"""`inrun.replay`: what every use of an example did to a target's loss at the end of the run."""

import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from inrun.errors import InrunError
from inrun.ledger import Ledger
from inrun.ledger.schema import read_run
from inrun.parallel import Processes
from inrun.replaying.book import Walk, place_of_scheme, replayed, scheme_name
from inrun.replaying.passes import Hessian, Passes
from inrun.replaying.record import BatchOf, Record
from inrun.replaying.recording import check_ways_back
from inrun.replaying.store import RecordingError
from inrun.replaying.trajectory import TrainLoss, Trajectory
from inrun.replaying.walk import Backwards, Progress
from inrun.scratch import free_memory
from inrun.state import preserved_random_state
from inrun.target import Evaluation, Loss, Target, losses
from inrun.units import Units, trained_parameters
from inrun.update import unwrapped

_SAME_LOSS = 1e-3  # relative: on another machine it is rounded otherwise


def replay(
    run: str | PathLike[str],
    targets: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    train_loss: TrainLoss | None = None,
    batch_of: BatchOf | None = None,
    horizon: float | None = None,
    hessian: Hessian = "auto",
    memory: int | Literal["auto"] = "auto",
    progress: Progress | None = None,
) -> Ledger:
    """Go back through a recorded run (`Attributor(..., replayable=True)`), and value every use of every example by what
    it did to the targets' losses at the run's end (design, 2.6).

    The value of example i in step t is minus the derivative of the target's loss at the end by the weight of i's loss
    in that step: nats of target loss to first order in the weight, positive = lowered it. It is exact for small changes
    of the weight; what leaving an example out would do is its sum over the steps, to first order. Targets may be others
    than the run's own.

    The values go into the run's ledger as the scheme "replay", or with a horizon "replay-hH"; targets that it has
    values of already are left as they are. A replay that was stopped goes on where it was when it is called again.

    Args:
        run: the run's folder.
        targets: name -> one batch, or a list or DataLoader of batches; the loss at the end is the mean over all.
        loss: loss(model, batch) -> scalar tensor, as for `Attributor`.
        model, optimizer: built as for the run; their weights and state do not matter. They are left as the run's last
            step left them. Of a run of `inrun train`, they and `loss` may be left out; targets are then name -> file of
            text, or batches, and by default those of the run.
        train_loss: train_loss(model, batch) -> the scalar tensor that backward() was called on in the run (without a
            scaler's scale), of what `attributor.batch(ids, data=batch)` was given; by default `loss`.
        batch_of: batch_of(ids) -> a batch, on the model's device, where `data` was not given.
        horizon: look ahead by so many steps on average: the derivative that is gone back with is (1 - rho) times the
            target's gradient at the step plus rho times what comes from the later ones, horizon = rho / (1 - rho). It
            takes one more target gradient a step, of the target's batches in rotation. None: to the run's end. 0: the
            target's gradient at the step's end, and no Hessian.
        hessian: how the Hessian of a batch's loss is multiplied with: by a "double" backward pass, by a central
            "difference" of gradients, or "auto": the first where the model has it.
        memory: bytes of host memory for what steps found; "auto" is half of what is free. Where a segment between two
            checkpoints takes more, it is repeated once more.
        progress: called with the steps done so far (one that is repeated, and not gone back through yet, counts a
            quarter), all steps, and the training loss there; by default a line on stderr.

    Returns:
        The ledger of the scheme: `Ledger(run, scheme="replay")`.

    Raises:
        RecordingError: the run was not recorded; model, optimizer or data are others; or a step, repeated, leads to
            other weights. InrunError: an optimizer that a replay cannot go back through, several processes, targets
            without batches, or other batches for a target that has values already. ConservationError: as in training.
    """
    folder, record = Path(run), Record(Path(run))
    if horizon is not None and not 0 <= horizon < math.inf:
        raise InrunError(f"horizon={horizon}: give a number of steps, 0 or more; None for the whole run.")
    if hessian not in ("auto", "double", "difference"):
        raise InrunError(f"hessian={hessian!r} is not known: choose 'auto', 'double' or 'difference'.")
    if model is None and optimizer is None:
        from inrun.lm.replay import replay_run  # an extra

        if train_loss is not None or batch_of is not None:
            raise InrunError("train_loss= and batch_of= go with model= and optimizer=.")
        return replay_run(folder, targets, loss, horizon=horizon, hessian=hessian, memory=memory, progress=progress)
    if model is None or optimizer is None or loss is None:
        raise InrunError("give model=, optimizer= and loss=, or none of them for a run of `inrun train`.")
    if not targets:
        raise InrunError("no targets: give at least one named validation batch.")
    optimizers = tuple(map(unwrapped, (optimizer,) if isinstance(optimizer, Optimizer) else optimizer))
    check_ways_back(optimizers)
    processes = Processes(model)
    if processes.size > 1:
        raise InrunError("inrun.replay() is for one process.")
    names = trained_parameters(processes.model, optimizers)
    evaluation = Evaluation(processes)
    found = [Target(name, batches, loss, evaluation) for name, batches in targets.items()]
    name, marks = scheme_name(horizon), {target.name: target.mark() for target in found}
    end = (record.steps, record.lines[-1].mark)
    there = replayed(folder, name, end)
    for target, mark in marks.items():
        if there.get(target, mark) != mark:
            raise InrunError(
                f"{place_of_scheme(folder, name)} has values for other batches of a target {target!r}: name these "
                "otherwise."
            )
    if record.torn:
        warnings.warn(
            f"{record.folder}: the recording ends with step {record.steps}, and has a checkpoint after step "
            f"{record.torn}: the steps after {record.steps} were lost (the run was killed, or a file was cut off), and "
            f"values are by the weights after step {record.steps}.",
            stacklevel=2,
        )
    if record.checkpoints()[:1] != [0]:
        raise RecordingError(f"{record.folder}: the checkpoint of the run's beginning is missing: restore it.")
    trajectory = Trajectory(record, processes.model, optimizers, names, train_loss or loss, batch_of)
    evaluation.autocast = trajectory.batches(record.steps)[-1].autocast
    missing = {target.name: target.batches for target in found if target.name not in there}
    present = {target.name: target.batches for target in found if target.name in there}
    if present:
        _check_losses(folder, name, trajectory, at_end(present, loss, evaluation))
    if not missing:
        return Ledger(folder, scheme=name)
    if memory != "auto" and (isinstance(memory, str) or memory < 0):
        raise InrunError(f"memory={memory!r}: give a number of bytes, or 'auto'.")
    room = (free_memory() // 2 if memory == "auto" else memory) // max(trajectory.state_size(), 1)
    modes = [(module, module.training) for module in processes.model.modules()]
    walk = Walk(folder, name, horizon, {target: marks[target] for target in missing}, end)
    ends = at_end(missing, loss, evaluation)
    passes = Passes(trajectory, processes, Units(processes.model, names), ends, record.about["batch_dim"], hessian)
    backwards = Backwards(trajectory, passes, walk, ends, horizon, room, progress or _Line())
    try:
        with preserved_random_state(processes.model):
            told = backwards.go()
            trajectory.to_end()
        walk.finish({key: told[key] for key in ("hessian", "hessian_error", "at_end", "largest", "losses")})
    finally:
        walk.close()
        passes.detach()
        for module, mode in modes:
            module.training = mode
    return Ledger(folder, scheme=name)


def at_end(batches: Mapping[str, list[Any]], loss: Loss, evaluation: Evaluation) -> list[Target]:
    """Targets whose loss is the mean over all their batches."""
    return [Target(name, of, loss, evaluation, each=len(of)) for name, of in batches.items()]


def _check_losses(run: Path, name: str, trajectory: Trajectory, targets: Sequence[Target]) -> None:
    """Raise InrunError if a target that has values has another loss now."""
    trajectory.to_end()
    folder = place_of_scheme(run, name)
    told = read_run(folder)["targets"]
    for target, loss in zip(targets, losses(targets, trajectory.step), strict=True):
        before = told[target.name]["loss"]
        if not math.isclose(loss, before, rel_tol=_SAME_LOSS, abs_tol=_SAME_LOSS):
            raise InrunError(
                f"{folder} has values for another loss of target {target.name!r} ({before:.6g} nats at the run's end, "
                f"and this one is {loss:.6g}): name it otherwise."
            )


class Clock:
    """What a line about progress says: how far it is, the rate and the time left, of this process."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._first: float | None = None

    def text(self, done: float, steps: int, loss: float | None) -> str:
        if self._first is None:
            self._first, self._begun = done, time.monotonic()
        rate = (done - self._first) / max(time.monotonic() - self._begun, 1e-9)
        found = "" if loss is None else f"training loss {loss:.3f}  "
        if rate:
            found += f"{rate:.2g} steps/s  {timedelta(seconds=round((steps - done) / rate))} left"
        return found


class _Line:
    """Progress on stderr: a line that is written over in a terminal, and now and then one elsewhere."""

    def __init__(self) -> None:
        self._clock, self._told = Clock(), -math.inf
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: float, steps: int, loss: float | None) -> None:
        text, now = self._clock.text(done, steps, loss), time.monotonic()
        if now - self._told < (0.2 if self._terminal else 15) and done < steps:
            return
        self._told = now
        line = f"replay {done:.0f}/{steps} steps  {text}"
        over, end = ("\r", "\x1b[K" + ("\n" if done == steps else "")) if self._terminal else ("", "\n")
        print(f"{over}{line}", end=end, file=sys.stderr, flush=True)
