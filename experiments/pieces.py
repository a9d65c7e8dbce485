"""A study in pieces: each is computed once, by itself, and kept as a file, so that a study that was stopped goes on."""

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn


class Piece(Protocol):
    """What is computed by itself; `name` is that of its file."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Piece)


def file_name(*parts: object) -> str:
    """A piece's name of what it is: with no blanks and commas."""
    return "-".join(map(str, parts)).replace(", ", "-").replace(" ", "-")


def hash_of(model: nn.Module) -> NDArray[np.str_]:
    """Of the trained weights: pieces of one run keep it as `weights`, for `load` to look at."""
    trained = (p for p in model.parameters() if p.requires_grad)
    return np.array(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trained)).hexdigest())


def text_in(path: Path, write: Callable[[Path], None], console: Console) -> Path:
    """The file of a study's text, which is written where it is not there yet."""
    if not path.exists():
        console.print("reading and tokenizing the text", highlight=False)
        write(path)
    return path


def _bring(work: Callable[[Any], Mapping[str, Any]], piece: Piece, path: Path) -> None:
    """A piece into the store, with one thread; `seconds` is what it took."""
    threads, begun = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)
    found = {**work(piece), "seconds": time.monotonic() - begun}
    draft = path.with_name(f".{piece.name}.partial.npz")
    np.savez(draft, **found)
    os.replace(draft, path)
    torch.set_num_threads(threads)


def compute(
    work: Callable[[P], Mapping[str, Any]], pieces: Iterable[P], folder: Path, workers: int, console: Console
) -> dict[P, Path]:
    """Bring every piece into the store, several at a time in processes of their own; `work(piece)` are its arrays."""
    paths = {piece: folder / f"{piece.name}.npz" for piece in pieces}
    missing = [piece for piece, path in paths.items() if not path.exists()]
    begun = time.monotonic()
    if workers == 1:
        for k, piece in enumerate(missing, start=1):
            _bring(work, piece, paths[piece])
            _tell(console, k, len(missing), piece, begun)
        return paths
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_bring, work, piece, paths[piece]): piece for piece in missing}
        for k, done in enumerate(as_completed(waiting), start=1):
            if done.exception() is not None:
                pool.shutdown(cancel_futures=True)  # or it would go on to the last piece before it says so
            done.result()
            _tell(console, k, len(missing), waiting[done], begun)
    return paths


def _tell(console: Console, done: int, of: int, piece: Piece, begun: float) -> None:
    """A line for a finished piece, with the time left if the others take as long."""
    left = (time.monotonic() - begun) / done * (of - done) / 60
    console.print(f"{done}/{of}  {piece.name}  {left:.0f} min left", highlight=False)
    console.file.flush()


def load(
    paths: Mapping[P, Path], run_of: Callable[[P], object] = lambda piece: None
) -> dict[P, dict[str, NDArray[Any]]]:
    """The arrays of all pieces. Those of one run, as `run_of` says, must have the same `weights`, where they have any:
    an AssertionError tells which have not.
    """
    found: dict[P, dict[str, NDArray[Any]]] = {}
    ends: dict[object, set[str]] = {}
    for piece, path in paths.items():
        with np.load(path) as arrays:
            found[piece] = dict(arrays)
        if "weights" in found[piece]:
            ends.setdefault(run_of(piece), set()).add(str(found[piece]["weights"]))
    for run, weights in ends.items():
        assert len(weights) == 1, f"{run}: the weights depend on how the values are computed"
    return found


def seconds(paths: Iterable[Path]) -> float:
    """What the pieces took in all, each with one thread."""
    found = 0.0
    for path in paths:
        with np.load(path) as arrays:
            found += float(arrays["seconds"])
    return found
