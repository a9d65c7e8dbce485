"""Whether a replay's values predict really training without examples, and find wrong labels.

    python -m experiments.replay.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished piece is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

from functools import partial
from pathlib import Path

from rich.console import Console

from experiments import pieces
from experiments.replay.subsets import work
from experiments.replay.training import QUICK, Piece, Study, pieces_of
from experiments.study import carry_out


def compute(study: Study, folder: Path, workers: int, console: Console) -> dict[Piece, Path]:
    """Bring every piece into the store."""
    return pieces.compute(partial(work, study), pieces_of(study), folder, workers, console)


def main(arguments: list[str] | None = None) -> None:
    carry_out("replay", __doc__, Study(), QUICK, compute, arguments)


if __name__ == "__main__":
    main()
