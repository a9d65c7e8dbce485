"""Whether values find images with a wrong label, and what training on the best images gives.

    python -m experiments.mislabel.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished piece is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import pieces
from experiments.mislabel import rivals, training
from experiments.mislabel.config import QUICK, Piece, Study, pieces_of, selections_of
from experiments.mislabel.report import values_of
from experiments.study import carry_out

PARTS: dict[str, Callable[[Study, Piece], Mapping[str, Any]]] = {
    "passes": rivals.passes, "early": rivals.early, "trak": rivals.trak, "small": rivals.small,
    "too far": training.too_far,
}  # fmt: skip


def work(study: Study, piece: Piece) -> Mapping[str, Any]:
    return PARTS.get(piece.part, training.valued)(study, piece)


def select(study: Study, paths: Mapping[Piece, Path], piece: Piece) -> Mapping[str, Any]:
    method = piece.part.removeprefix("select ")
    if method == piece.part:
        return training.selected(study, piece, None)
    return training.selected(study, piece, values_of(study, paths, piece.source, piece.seed)[method])


def compute(study: Study, folder: Path, workers: int, console: Console) -> dict[Piece, Path]:
    """Bring every piece into the store: the methods' values, and then what is selected by them."""
    paths = pieces.compute(partial(work, study), pieces_of(study), folder, workers, console)
    return paths | pieces.compute(partial(select, study, paths), selections_of(study), folder, workers, console)


def main(arguments: list[str] | None = None) -> None:
    carry_out("mislabel", __doc__, Study(), QUICK, compute, arguments)


if __name__ == "__main__":
    main()
