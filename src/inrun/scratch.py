"""Room for tensors that must outlive a step: host memory up to a budget, and the disk beyond it."""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inrun.errors import InrunError

_RESERVE = 0.9  # of the free disk may be filled
_ALIGNED = 8  # bytes: the largest number of any dtype


def free_memory() -> int:
    """Bytes of host memory that can be had without swapping; 2 GiB where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (FileNotFoundError, StopIteration):
        return 2 * 2**30


def gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


Key = tuple[str | None, str]


@dataclass
class Kept:
    """Tensors in the scratch room, and how many bytes of host memory they take (0: they lie on disk)."""

    tensors: dict[Key, Tensor]
    memory: int


class Scratch:
    """Keeps tensors on the host. A file is unlinked as soon as it is mapped, so that nothing stays after a crash."""

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.folder = budget, Path(tempfile.gettempdir()) if folder is None else folder
        self._used = 0

    def room(self) -> int:
        """Bytes that can still be kept."""
        return max(self.budget - self._used, 0) + int(_RESERVE * shutil.disk_usage(self.folder).free)

    def put(self, tensors: Mapping[Key, Tensor]) -> Kept:
        """A copy of the tensors on the host. Raises InrunError if the disk refuses."""
        size = size_of(tensors.values())
        if self._used + size <= self.budget:
            self._used += size
            return Kept({key: x.detach().cpu().clone() for key, x in tensors.items()}, size)
        return Kept(self._on_disk(tensors), 0)

    def drop(self, kept: Kept) -> None:
        self._used -= kept.memory
        kept.tensors, kept.memory = {}, 0

    def _on_disk(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        handle, name = tempfile.mkstemp(prefix=".inrun-", dir=self.folder)
        try:
            with os.fdopen(handle, "w+b") as file:
                for x in tensors.values():  # written, not mapped: a full disk is then an error, not a signal
                    file.write(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                    file.write(bytes(-file.tell() % _ALIGNED))
                file.flush()
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise InrunError(
                f"{self.folder}: what must be kept of past steps could not be written ({error.strerror or error}): "
                "free space there, or raise memory=."
            ) from error
        finally:
            os.unlink(name)
        found, begin = {}, 0
        for key, x in tensors.items():
            found[key] = torch.empty(x.shape, dtype=x.dtype)
            if x.numel():
                found[key] = torch.frombuffer(whole, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape)
            end = begin + x.numel() * x.element_size()
            begin = end + -end % _ALIGNED
        return found


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)
