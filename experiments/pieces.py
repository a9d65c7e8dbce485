"""A study in pieces: each is computed once, by itself, and kept as a file, so that a study that was stopped goes on."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from rich.console import Console


class Piece(Protocol):
    """What is computed by itself; `name` is that of its file."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Piece)


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


def seconds(paths: Iterable[Path]) -> float:
    """What the pieces took in all, each with one thread."""
    found = 0.0
    for path in paths:
        with np.load(path) as arrays:
            found += float(arrays["seconds"])
    return found
