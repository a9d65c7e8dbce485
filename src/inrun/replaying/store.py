"""The files of a recording: lines and tensors that are appended, and checkpoints. No pickle is written or read.

recording/run.json           what is to be the same when the run is repeated
recording/steps.jsonl        a line for every step; where it holds tensors, their place in tensors.bin
recording/tensors.bin        batches and random states
recording/checkpoints/N.safetensors   weights, buffers and optimizer state after step N, with a checksum
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inrun.errors import InrunError
from inrun.ledger.files import sync_folder

RUN, STEPS, TENSORS, CHECKPOINTS = "run.json", "steps.jsonl", "tensors.bin", "checkpoints"
_PLACE = "__tensor__"
_TUPLE = "__tuple__"
_CHECKSUM, _NUMBERS = "sha256", "numbers"


class RecordingError(InrunError):
    """A recording cannot be written, read, or repeated: says what, where, and what to do."""


def place_of(run: Path) -> Path:
    """The folder of a run's recording."""
    return run / "recording"


def as_bytes(x: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    found: np.ndarray[Any, np.dtype[np.uint8]] = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return found


class Tree:
    """Data on its way to the files: plain values as JSON holds them, tensors apart."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def of(self, x: Any, where: str) -> Any:
        """What JSON holds of it. Raises RecordingError for what is neither plain nor a tensor."""
        if isinstance(x, Tensor):
            if x.layout is not torch.strided:
                raise RecordingError(f"{where}: a tensor of layout {x.layout} cannot be recorded; give a dense one.")
            self.tensors.append(x.detach().cpu().clone())
            return {_PLACE: len(self.tensors) - 1}
        if isinstance(x, np.ndarray | np.generic):
            return self.of(torch.as_tensor(x), where)
        if isinstance(x, Mapping):
            if not all(isinstance(key, str) for key in x) or _PLACE in x or _TUPLE in x:
                raise RecordingError(f"{where}: a mapping with the keys {list(x)[:4]}; name them by strings.")
            return {key: self.of(value, f"{where}[{key!r}]") for key, value in x.items()}
        if isinstance(x, list | tuple):
            parts = [self.of(one, f"{where}[{k}]") for k, one in enumerate(x)]
            return parts if isinstance(x, list) else {_TUPLE: parts}
        if x is None or isinstance(x, bool | int | float | str):
            return x
        raise RecordingError(
            f"{where} is a {type(x).__name__}: data= may hold tensors, arrays, numbers, strings, and lists, tuples and "
            "mappings of them. Leave data= out and give inrun.replay() batch_of=, which makes a batch of its ids."
        )


class Tape:
    """Lines with tensors, appended. What is not flushed may be lost in a crash, and a torn end is cut off."""

    def __init__(self, folder: Path) -> None:
        self._lines = open(folder / STEPS, "ab")  # noqa: SIM115 - closed by close()
        self._tensors = open(folder / TENSORS, "ab")  # noqa: SIM115

    def append(self, line: Any, tensors: Iterable[Tensor]) -> None:
        """Write a line, its tensors' numbers replaced by their places."""
        places = []
        for x in tensors:
            raw = as_bytes(x)
            layout = [] if x.is_contiguous() else [list(x.stride())]  # by which operators choose how to compute
            places.append([self._tensors.tell(), str(x.dtype).removeprefix("torch."), list(x.shape), *layout])
            self._tensors.write(raw.data)
        text = json.dumps(_with_places(line, places))
        self._lines.write(text.encode() + b"\n")

    def flush(self) -> None:
        """Make all that is written durable."""
        for file in (self._tensors, self._lines):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self.flush()
        self._lines.close()
        self._tensors.close()


def _with_places(x: Any, places: list[Any]) -> Any:
    if isinstance(x, dict):
        if x.keys() == {_PLACE} and isinstance(x[_PLACE], int):
            return {_PLACE: places[x[_PLACE]]}
        return {key: _with_places(value, places) for key, value in x.items()}
    return [_with_places(one, places) for one in x] if isinstance(x, list) else x


def placed(x: Any) -> list[Any]:
    """The places of the tensors in a line."""
    if isinstance(x, dict):
        if x.keys() == {_PLACE}:
            return [x[_PLACE]]
        return [place for value in x.values() for place in placed(value)]
    return [place for one in x for place in placed(one)] if isinstance(x, list) else []


def read_lines(folder: Path) -> list[tuple[dict[str, Any], int, int]]:
    """The whole lines of a recording, each with where it ends in the two files; a torn end is left out."""
    found: list[tuple[dict[str, Any], int, int]] = []
    path, size, end, room = folder / STEPS, (folder / TENSORS).stat().st_size, 0, 0
    with open(path, "rb") as file:
        for raw in file:
            end += len(raw)
            if not raw.endswith(b"\n"):
                break
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise RecordingError(f"{path}: line {len(found) + 1} is damaged ({error}): restore a copy.") from error
            ends = [at + _size(dtype, shape) for at, dtype, shape, *_ in placed(line)]
            room = max([room, *ends])
            if room > size:
                break
            found.append((line, end, room))
    return found


def _size(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * int(getattr(torch, dtype).itemsize)


def restored(x: Any, tensors: np.ndarray[Any, Any]) -> Any:
    """What a line holds, with its tensors."""
    if isinstance(x, dict):
        if x.keys() == {_PLACE}:
            at, dtype, shape, *layout = x[_PLACE]
            kind = getattr(torch, dtype)
            raw = torch.from_numpy(np.array(tensors[at : at + _size(dtype, shape)]))
            found = raw.view(kind).view(shape) if raw.numel() else torch.empty(shape, dtype=kind)
            return torch.empty_strided(shape, layout[0], dtype=kind).copy_(found) if layout else found
        if x.keys() == {_TUPLE}:
            return tuple(restored(one, tensors) for one in x[_TUPLE])
        return {key: restored(value, tensors) for key, value in x.items()}
    return [restored(one, tensors) for one in x] if isinstance(x, list) else x


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names and numbers."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        found.update(as_bytes(x).data)
    return found.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Write the file whole or not at all, with a checksum. Raises RecordingError."""
    from safetensors.torch import save_file

    held = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    storages: dict[int, str] = {}
    for name, x in held.items():  # one memory may have two names in a model, and none here
        if storages.setdefault(x.untyped_storage().data_ptr(), name) != name:
            held[name] = x.clone()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(held, temporary, {_CHECKSUM: checksum(held), _NUMBERS: json.dumps(dict(numbers))})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:  # safetensors has errors of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise RecordingError(f"{path} could not be written ({error}): free space there, then go on.") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and numbers of a file. Raises RecordingError if it is missing, or not what was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise RecordingError(f"{path} cannot be read ({error}): restore it from a copy of the run.") from error
    if told.get(_CHECKSUM) != checksum(tensors):
        raise RecordingError(f"{path} is damaged (its checksum is another): restore it from a copy of the run.")
    return tensors, json.loads(told[_NUMBERS])
