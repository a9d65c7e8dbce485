"""What a run keeps so that every step can be repeated bit for bit: `Attributor(..., replayable=True)`.

Of every step: the batches' ids and data, random states, autocast and modes at their forward passes, the optimizers'
hyperparameters, the loss's scale, and a mark of the weights after it. And checkpoints, every so many steps.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inrun.gradient import sample
from inrun.ledger.files import write_whole
from inrun.replaying.store import (
    CHECKPOINTS,
    RUN,
    STEPS,
    TENSORS,
    RecordingError,
    Tape,
    Tree,
    as_bytes,
    checksum,
    place_of,
    read_lines,
    write_tensors,
)
from inrun.scratch import gib
from inrun.state import RandomState
from inrun.update import Update, update_of

FORMAT = 1
_SHARE = 4  # of the free disk, one part in so many is for checkpoints if nothing else is said
# a parameter at a step: without a gradient, with one of zero since it is frozen, with the one that backward made
RESTS, DRIFTS, MOVES = "0", "2", "1"
_MOVES = {(False, False): RESTS, (False, True): RESTS, (True, False): DRIFTS, (True, True): MOVES}
_CLIPPED = 1e-3  # how far the gradient's norm may be from what the rule says


@dataclass(frozen=True)
class Recording:
    """How a run is recorded: `Attributor(..., replayable=Recording(clip_norm=1.0))`.

    Args:
        every: steps between checkpoints, to begin with.
        disk: bytes that checkpoints may take; by default a quarter of what is free. When there are more, every other
            one is removed, and they are written half as often.
        clip_norm: the norm that the gradient is clipped to between backward and step, as
            torch.nn.utils.clip_grad_norm_ does it over all parameters of the model.
        clip_value: the value that its numbers are clipped to, as torch.nn.utils.clip_grad_value_ does it.
        scaler: the torch.amp.GradScaler that scales the loss, if there is one.
    """

    every: int = 16
    disk: int | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    scaler: Any = None

    def check(self) -> None:
        """Raise RecordingError for numbers that are out of their range."""
        for name, given, least in (("every", self.every, 1), ("disk", self.disk, 1)):
            if given is not None and given < least:
                raise RecordingError(f"Recording({name}={given}): give {least} or more.")
        for name, limit in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if limit is not None and not 0 < limit < math.inf:
                raise RecordingError(f"Recording({name}={limit}): give a number above 0, or leave it out.")
        if self.clip_norm is not None and self.clip_value is not None:
            raise RecordingError("Recording: give clip_norm= or clip_value=, not both.")


def mark(names: Mapping[nn.Parameter, str]) -> str:
    """A few letters that tell these weights from others, by some numbers of each."""
    found = hashlib.sha256()
    for p in names:
        found.update(as_bytes(sample(p)).data)
    return found.hexdigest()[:16]


def held_by(
    model: nn.Module, optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, buffers and optimizer state, as tensors and numbers by name."""
    tensors = {f"weight/{name}": p.detach() for p, name in names.items()}
    tensors |= {f"buffer/{name}": x.detach() for name, x in model.named_buffers()}
    numbers: dict[str, Any] = {}
    for k, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for p in group["params"]:
                for key, x in optimizer.state.get(p, {}).items():
                    name = f"state/{k}/{names.get(p)}/{key}"
                    if isinstance(x, Tensor):
                        tensors[name] = x.detach()
                    elif isinstance(x, int | float):
                        numbers[name] = x
                    elif x is not None:
                        raise RecordingError(f"{name}: a {type(x).__name__} of the optimizer's cannot be recorded.")
    return tensors, numbers


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's, as JSON holds them. Raises RecordingError for one that JSON holds otherwise."""
    found = {k: _plain(v) for k, v in group.items() if k != "params"}
    for name, x in found.items():
        if isinstance(x, np.generic) and not isinstance(x, float) and name != "initial_lr":
            raise RecordingError(
                f"the optimizer's {name} is a numpy {x.dtype}, by which torch's arithmetic rounds otherwise than by a "
                f"number of Python: set float({name})."
            )
    kinds = (bool, int, float, str, type(None))
    return {
        k: x
        for k, x in found.items()
        if isinstance(x, kinds) or (isinstance(x, list) and all(isinstance(one, kinds) for one in x))
    }


def _plain(x: Any) -> Any:
    """Without tensors and tuples."""
    if isinstance(x, list | tuple):
        return [_plain(one) for one in x]
    return x.item() if isinstance(x, Tensor) and x.numel() == 1 else x


def _listed(ids: Any) -> Any:
    """Ids as lists of plain values."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, Sequence) and not isinstance(ids, str):
        return [_listed(one) for one in ids]
    return ids


def about(model: nn.Module, optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """What must be the same when the run is repeated."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if p not in names}
    return {
        "parameters": {name: [list(p.shape), str(p.dtype)] for p, name in names.items()},
        "optimizers": [
            {
                "class": type(optimizer).__name__,
                "groups": [[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups],
            }
            for optimizer in optimizers
        ],
        "modules": len(list(model.modules())),
        "frozen": checksum(frozen),
    }


def check_ways_back(optimizers: Sequence[Optimizer]) -> None:
    """Raise RecordingError for an optimizer that a replay cannot go back through."""
    for optimizer in optimizers:
        if type(update_of(optimizer)).back is Update.back:
            raise RecordingError(
                f"{type(optimizer).__name__}: a replay goes back through the steps of SGD, Adam and AdamW, not of this "
                "one. To add it, give its Update the method `back` (docs/optimizers.md)."
            )


class Recorder:
    """Records the steps of one run into its folder."""

    def __init__(
        self,
        run: Path,
        settings: Recording,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        names: Mapping[nn.Parameter, str],
        batch_dim: int,
        resume: bool,
    ) -> None:
        settings.check()
        check_ways_back(optimizers)
        self._folder, self._settings = place_of(run), settings
        self._model, self._optimizers, self._names = model, optimizers, names
        self._every = settings.every
        self._pending, self._tree = list[dict[str, Any]](), Tree()  # of the step's batches so far
        self._data: Any = None  # of the batch whose block is open
        self._moved = ""  # of every parameter how it moves
        self._added = 0  # tensors of whole blocks in the tree
        self._random: dict[str, Tensor] = {}  # as written last
        self._ahead: RandomState | None = None
        checkpoints = self._folder / CHECKPOINTS
        free = shutil.disk_usage(run).free // _SHARE
        self._disk = settings.disk if settings.disk is not None else free
        described = {
            "format": FORMAT,
            "batch_dim": batch_dim,
            "clip_norm": settings.clip_norm,
            "clip_value": settings.clip_value,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **about(model, optimizers, names),
        }
        if (self._folder / RUN).exists():
            before = json.loads((self._folder / RUN).read_bytes())
            apart = [k for k in described if described[k] != before.get(k) and k not in ("torch", "threads")]
            if apart:
                raise RecordingError(
                    f"{self._folder}: this run was recorded with other {', '.join(apart)}: resume it as it was begun."
                )
        elif resume and any((run / "steps").glob("*.parquet")):
            raise RecordingError(
                f"{run}: this run was begun without replayable=, so that its first steps cannot be repeated: resume it "
                "without."
            )
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
            for name in (STEPS, TENSORS):
                (self._folder / name).touch()
            if not (self._folder / RUN).exists():
                write_whole(self._folder / RUN, 0, json.dumps(described, indent=2).encode())
        except OSError as error:
            raise RecordingError(
                f"{self._folder}: the recording could not be begun ({error.strerror or error}): free space there."
            ) from error
        for torn in checkpoints.glob(".*.tmp"):
            torn.unlink()
        self._steps, self._mark = 0, ""  # after the last step that was recorded
        self._tape = self._cut(None)

    def _cut(self, step: int | None) -> Tape:
        """Remove what was recorded after the step, or only a torn end."""
        kept = [one for one in read_lines(self._folder) if step is None or one[0]["step"] <= step]
        self._steps, self._mark = (kept[-1][0]["step"], kept[-1][0]["mark"]) if kept else (0, "")
        if step is not None and self._steps < step:
            raise RecordingError(
                f"{self._folder}: the recording ends with step {self._steps}, and the run is resumed after {step}: "
                "resume it from an earlier checkpoint, or begin it again."
            )
        *_, lines, tensors = kept[-1] if kept else (None, 0, 0)
        for name, size in ((STEPS, lines), (TENSORS, tensors)):
            with open(self._folder / name, "r+b") as file:
                file.truncate(size)
        for at, path in checkpoints_in(self._folder).items():
            if at > self._steps:
                path.unlink()
        self._random = {}
        return Tape(self._folder)

    def cut(self, step: int) -> None:
        """The run goes on after this step. Raises RecordingError if it was not recorded up to it."""
        self._tape.close()
        self.discard()
        self._tape = self._cut(step)

    def begin(self, step: int, data: Any, *, first: bool) -> None:
        """A batch's block begins, in a run that has done so many steps; `first`: of its step.

        `data`: what makes its loss, as it is before the block, which may write to it; None: only the ids are kept.
        """
        if step != self._steps:
            raise RecordingError(
                f"{self._folder}: the recording ends with step {self._steps}, and this is step {step + 1}, so that the "
                "run could not be repeated: resume it from a checkpoint (load_state_dict), or begin it in another "
                "folder."
            )
        if first:
            self.discard()
            if step % self._every == 0:
                self._checkpoint(step)
        del self._tree.tensors[self._added :]  # of a block that failed
        self._data = None if data is None else self._tree.of(data, "data")
        self._ahead = RandomState(self._model)

    def add(self, ids: Any, autocast: torch.dtype | None) -> None:
        """What the block was, that is at its end."""
        assert self._ahead is not None
        tree, state = self._tree, self._ahead.tensors()
        line: dict[str, Any] = {
            "ids": tree.of(_listed(ids), "ids"),
            "data": self._data,
            "random": {},
            "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
            "modes": "".join("1" if m.training else "0" for m in self._model.modules()),
        }
        # only what was drawn from since the batch before it
        for name, x in state.items():
            if name not in self._random or not torch.equal(self._random[name], x):
                line["random"][name] = tree.of(x, name)
        self._random, self._added = state, len(tree.tensors)
        self._pending.append(line)

    def discard(self) -> None:
        """The batches since the last step move nothing."""
        if self._pending:
            self._random = {}  # what they changed is not written
        self._pending, self._tree, self._added = [], Tree(), 0

    def check_gradient(self, step: int, made: float, received: float, moved: Collection[nn.Parameter]) -> None:
        """Hold the norms of the gradient that backward made and of what the optimizers receive against the settings,
        and remember the parameters that have one.

        Raises RecordingError if something was done to it that a replay would not repeat.
        """
        settings, self._moved = self._settings, "".join(_MOVES[p in moved, p.requires_grad] for p in self._names)
        scale = self._scale()
        expected = made / scale
        if settings.clip_value is not None:
            return  # the weights' marks tell
        if settings.clip_norm is not None:
            expected = min(expected, expected * settings.clip_norm / (expected + 1e-6))
        if abs(received - expected) > _CLIPPED * max(expected, received):
            told = f"clip_norm={settings.clip_norm}" + (f" and a scale of {scale:g}" if scale != 1 else "")
            raise RecordingError(
                f"step {step}: the gradient that backward made has the norm {made:.6g}, the optimizer receives one of "
                f"{received:.6g}, and with {told} it would be {expected:.6g}, so that a replay would not repeat this "
                "step. Say what is done between the two: replayable=inrun.Recording(clip_norm=..., or clip_value=..., "
                "or scaler=...)."
            )

    def _scale(self) -> float:
        return 1.0 if self._settings.scaler is None else float(self._settings.scaler.get_scale())

    def step(self, step: int, loss: float | None) -> None:
        """The optimizers have taken the step. Raises RecordingError if it cannot be written."""
        line: dict[str, Any] = {
            "step": step,
            "batches": self._pending,
            "groups": [[hyperparameters(group) for group in o.param_groups] for o in self._optimizers],
            "scale": self._scale(),
            "loss": loss,
            "mark": mark(self._names),
            "moved": self._moved,
        }
        self._mark = line["mark"]
        try:
            self._tape.append(line, self._tree.tensors)
        except OSError as error:
            raise RecordingError(
                f"{self._folder}: step {step} could not be recorded ({error.strerror or error}): free space there."
            ) from error
        self._pending, self._tree, self._added, self._steps = [], Tree(), 0, step

    def _checkpoint(self, step: int) -> None:
        found = checkpoints_in(self._folder)
        if step in found:
            return
        path = self._folder / CHECKPOINTS / f"{step:09d}.safetensors"
        write_tensors(path, *held_by(self._model, self._optimizers, self._names))
        found[step] = path
        while len(found) > 2 and sum(of.stat().st_size for of in found.values()) > self._disk:
            self._every *= 2
            removed = [at for at in found if at % self._every and at != max(found)]
            for at in removed:
                found.pop(at).unlink()
            if not removed and self._every > max(found):
                raise RecordingError(
                    f"{self._folder}: two checkpoints take more than the {gib(self._disk)} that checkpoints may take: "
                    "raise Recording(disk=...)."
                )

    def flush(self) -> None:
        """Make what is recorded durable."""
        try:
            self._tape.flush()
        except OSError as error:
            raise RecordingError(
                f"{self._folder}: could not be written ({error.strerror or error}): free space there."
            ) from error

    def close(self) -> None:
        """Keep the weights of the run's end, too, if they are still there."""
        try:
            if self._steps and self._mark == mark(self._names):
                self._checkpoint(self._steps)
        finally:
            self._tape.close()


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints of a recording: files by step, in their order."""
    found = {int(path.stem): path for path in (folder / CHECKPOINTS).glob("[0-9]*.safetensors")}
    return dict(sorted(found.items()))
