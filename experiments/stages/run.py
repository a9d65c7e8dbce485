"""Which source's value for a target comes when.

    python -m experiments.stages.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished piece is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

from functools import partial
from pathlib import Path

from rich.console import Console

from experiments import pieces
from experiments.stages.config import QUICK, Piece, Study, pieces_of
from experiments.stages.training import work, write_text
from experiments.study import carry_out


def compute(study: Study, folder: Path, workers: int, console: Console) -> dict[Piece, Path]:
    """Bring every piece into the store."""
    text = pieces.text_in(folder / "text.npz", partial(write_text, study), console)
    return pieces.compute(partial(work, study, text), pieces_of(study), folder, workers, console)


def main(arguments: list[str] | None = None) -> None:
    carry_out("stages", __doc__, Study(), QUICK, compute, arguments)


if __name__ == "__main__":
    main()
