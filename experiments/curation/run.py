"""Whether training again without the text of negative value reaches the same loss in fewer steps.

    python -m experiments.curation.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished piece is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import pieces
from experiments.curation import rivals, training
from experiments.curation.choice import dropped, values_of
from experiments.curation.config import ALL, QUICK, Piece, Study, pieces_of, trainings_of
from experiments.curation.mixture import write_text
from experiments.study import carry_out

PARTS: dict[str, Callable[[Study, Path, Piece], Mapping[str, Any]]] = {
    "proxy": rivals.proxy, "influence": rivals.influence,
}  # fmt: skip


def work(study: Study, text: Path, piece: Piece) -> Mapping[str, Any]:
    return PARTS.get(piece.part, training.valued)(study, text, piece)


def train_again(study: Study, text: Path, paths: Mapping[Piece, Path], piece: Piece) -> Mapping[str, Any]:
    kept = np.ones(study.blocks, dtype=bool)
    if not piece.part.startswith(ALL):
        rule, _, method = piece.part.partition(" ")
        values = values_of(study, paths, piece.seed)
        kept = ~dropped(rule, values[method], values["path"])
    return training.trained_again(study, text, piece, kept)


def compute(study: Study, folder: Path, workers: int, console: Console) -> dict[Piece, Path]:
    """Bring every piece into the store: the values, and then the trainings on what they leave."""
    text = pieces.text_in(folder / "text.npz", partial(write_text, study), console)
    paths = pieces.compute(partial(work, study, text), pieces_of(study), folder, workers, console)
    again = partial(train_again, study, text, paths)
    return paths | pieces.compute(again, trainings_of(study), folder, workers, console)


def main(arguments: list[str] | None = None) -> None:
    carry_out("curation", __doc__, Study(), QUICK, compute, arguments)


if __name__ == "__main__":
    main()
