"""Which values say what the target's loss does when examples are really removed.

    python -m experiments.counterfactual.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished piece is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import pieces
from experiments.counterfactual import training, truth
from experiments.counterfactual.config import QUICK, Piece, Study, pieces_of, removals_of
from experiments.counterfactual.data import write_text
from experiments.counterfactual.report import values_of
from experiments.study import carry_out


def work(text: Path, piece: Piece) -> Mapping[str, Any]:
    """A piece, as it is stored."""
    if piece.part == "rivals":
        return training.rivals(piece, text)
    if piece.part == "single":
        return truth.single(piece, text)
    of = truth.subsets if piece.part.startswith("subsets") else training.in_run
    return of(piece, text)


def remove(text: Path, paths: Mapping[Piece, Path], piece: Piece) -> Mapping[str, Any]:
    method = piece.part.removeprefix("remove ")
    return truth.removals(piece, text, values_of(paths, piece.model, piece.seed)[method])


def compute(study: Study, folder: Path, workers: int, console: Console) -> dict[Piece, Path]:
    """Bring every piece into the store: values and subsets, and then the removals by values."""
    text = pieces.text_in(folder / "text.npz", partial(write_text, study), console)
    paths = pieces.compute(partial(work, text), pieces_of(study), folder, workers, console)
    return paths | pieces.compute(partial(remove, text, paths), removals_of(study), folder, workers, console)


def main(arguments: list[str] | None = None) -> None:
    carry_out("counterfactual", __doc__, Study(), QUICK, compute, arguments)


if __name__ == "__main__":
    main()
