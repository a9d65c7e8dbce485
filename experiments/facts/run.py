"""Whether the values find the few training examples that teach a fact, among real text.

    python -m experiments.facts.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished run is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

from functools import partial
from pathlib import Path

from rich.console import Console

from experiments import pieces
from experiments.facts.training import QUICK, Piece, Study, pieces_of, train, write_text
from experiments.study import carry_out


def compute(study: Study, folder: Path, workers: int, console: Console) -> dict[Piece, Path]:
    """Bring every piece into the store."""
    text = pieces.text_in(folder / "text.json", partial(write_text, study), console)
    return pieces.compute(partial(train, study, text), pieces_of(study), folder, workers, console)


def main(arguments: list[str] | None = None) -> None:
    carry_out("facts", __doc__, Study(), QUICK, compute, arguments)


if __name__ == "__main__":
    main()
