"""A recording, read: what every step was made of, and the checkpoints to begin from."""

import copy
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inrun.replaying.recording import FORMAT, about, checkpoints_in
from inrun.replaying.store import RUN, TENSORS, RecordingError, place_of, read_lines, read_tensors, restored

BatchOf = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Batch:
    """One batch of a step: its ids, what its loss is made of, and what its forward pass found."""

    ids: Any
    data: Any
    random: dict[str, Tensor]
    autocast: torch.dtype | None
    modes: str

    def fresh(self) -> Any:
        """The data, to be given away: a loss may write to its tensors, and take entries out of its mappings."""
        return _fresh(self.data)


@dataclass(frozen=True)
class Line:
    """What was recorded of a step, its batches aside."""

    step: int
    groups: list[list[dict[str, Any]]]
    scale: float
    loss: float | None
    mark: str
    moved: str | None  # of every trained parameter how it did, a letter each


class Record:
    """The recording of a run. Raises RecordingError where there is none, or not one that this version reads."""

    def __init__(self, run: Path) -> None:
        self.folder = place_of(run)
        try:
            self.about: dict[str, Any] = json.loads((self.folder / RUN).read_bytes())
        except FileNotFoundError as error:
            raise RecordingError(
                f"{run} was not recorded, so that it cannot be replayed: train with replayable=True "
                "(inrun train --replayable)."
            ) from error
        except (OSError, ValueError) as error:
            raise RecordingError(f"{self.folder / RUN} cannot be read ({error}): restore it from a copy.") from error
        if self.about.get("format") != FORMAT:
            raise RecordingError(
                f"{self.folder} has format {self.about.get('format')!r}; this version of inrun reads {FORMAT}."
            )
        found = [line for line, _, _ in read_lines(self.folder)]
        if not found or [line["step"] for line in found] != list(range(1, len(found) + 1)):
            raise RecordingError(f"{self.folder}: no step is recorded, or one is missing: it cannot be replayed.")
        self.lines = [
            Line(line["step"], line["groups"], line["scale"], line["loss"], line["mark"], line.get("moved"))
            for line in found
        ]
        self._batches = [line["batches"] for line in found]
        random: dict[str, Any] = {}  # a line holds what is new in it
        for batches in self._batches:
            for batch in batches:
                random = batch["random"] = {**random, **batch["random"]}
        size = (self.folder / TENSORS).stat().st_size
        self._tensors = np.memmap(self.folder / TENSORS, mode="r", dtype=np.uint8) if size else np.empty(0, np.uint8)

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return len(self.lines)

    def line(self, step: int) -> Line:
        return self.lines[step - 1]

    def batches(self, step: int, batch_of: BatchOf | None, device: torch.device) -> list[Batch]:
        """The step's batches, tensors on the device; `batch_of` makes one of its ids, where its data was not kept.

        Raises RecordingError if it was not kept, and there is no `batch_of`.
        """
        found = []
        for batch in self._batches[step - 1]:
            ids = restored(batch["ids"], self._tensors)
            if batch["data"] is None and batch_of is None:
                raise RecordingError(
                    f"{self.folder}: the data of step {step} was not recorded: give inrun.replay() batch_of=, which "
                    "makes a batch of its ids, or record it, with attributor.batch(ids, data=batch)."
                )
            data = batch_of(ids) if batch_of is not None else _on(restored(batch["data"], self._tensors), device)
            random = restored(batch["random"], self._tensors)
            autocast = None if batch["autocast"] is None else getattr(torch, batch["autocast"])
            found.append(Batch(ids, data, random, autocast, batch["modes"]))
        return found

    def checkpoints(self) -> list[int]:
        """The steps after which there is one, ascending."""
        return [step for step in checkpoints_in(self.folder) if step <= self.steps]

    @property
    def torn(self) -> int:
        """The last checkpoint, if it is after a step that is not recorded; 0 otherwise."""
        last = max(checkpoints_in(self.folder), default=0)
        return last if last > self.steps else 0

    def read(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and numbers of a checkpoint, by name."""
        return read_tensors(checkpoints_in(self.folder)[step])

    def check(self, model: nn.Module, optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str]) -> None:
        """Raise RecordingError if these are not those that were recorded."""
        for what, now in about(model, optimizers, names).items():
            if self.about[what] != now:
                raise RecordingError(
                    f"{self.folder}: {_WHAT[what]} not those of the recorded run"
                    + (f" ({self.about[what]}, and now {now})" if len(str(now)) < 200 else "")
                    + ": build model and optimizer as they were built for it."
                )


_WHAT = {
    "parameters": "the trained parameters (names, shapes, dtypes) are",
    "optimizers": "the optimizers or their groups of parameters are",
    "modules": "the model's modules are",
    "frozen": "the numbers of the parameters that are not trained are",
}


def _fresh(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.clone()
    if type(x) is dict:
        return {key: _fresh(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_fresh(one) for one in x)
    return copy.copy(x) if isinstance(x, MutableMapping) else x


def _on(x: Any, device: torch.device) -> Any:
    """Data with its tensors on the device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {key: _on(value, device) for key, value in x.items()}
    return type(x)(_on(one, device) for one in x) if isinstance(x, list | tuple) else x
