"""Whether the original of a reworded text is found among the training examples, as fewer and fewer words are the same.

    python -m experiments.paraphrase.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished piece is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import pieces
from experiments.paraphrase import texts, training, untrained
from experiments.paraphrase.config import QUICK, UNTRAINED, Piece, Study, pieces_of
from experiments.study import carry_out


def work(study: Study, text: Path, piece: Piece) -> Mapping[str, Any]:
    return (untrained.scored if piece.part == UNTRAINED else training.valued)(study, text, piece)


def compute(study: Study, folder: Path, workers: int, console: Console) -> dict[Piece, Path]:
    """Bring every piece into the store."""
    text = pieces.text_in(folder / "text.json", partial(texts.write, study), console)
    return pieces.compute(partial(work, study, text), pieces_of(study), folder, workers, console)


def main(arguments: list[str] | None = None) -> None:
    carry_out("paraphrase", __doc__, Study(), QUICK, compute, arguments)


if __name__ == "__main__":
    main()
