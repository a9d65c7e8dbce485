"""A study in pieces: each is computed once, by itself, and kept as a file, so that a study that was stopped goes on."""

import multiprocessing
import os
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
    """A piece into the store, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = work(piece)
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
    if workers == 1:
        for k, piece in enumerate(missing, start=1):
            _bring(work, piece, paths[piece])
            console.print(f"{k}/{len(missing)}  {piece.name}", highlight=False)
        return paths
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_bring, work, piece, paths[piece]): piece for piece in missing}
        for k, done in enumerate(as_completed(waiting), start=1):
            done.result()
            console.print(f"{k}/{len(missing)}  {waiting[done].name}", highlight=False)
    return paths
