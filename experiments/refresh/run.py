"""What values lose when the target's gradient is used for several steps, and when its batches rotate.

    python -m experiments.refresh.run [--quick] [--store FOLDER] [--out FOLDER]

Every finished run is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from experiments import pieces
from experiments.fidelity.report import write
from experiments.refresh import report
from experiments.refresh.training import QUICK, Piece, Study, pieces_of, train, write_text


def compute(study: Study, folder: Path, console: Console) -> dict[Piece, Path]:
    """Bring every piece into the store."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.npz"
    if not text.exists():
        console.print("reading and tokenizing the text", highlight=False)
        write_text(study, text)
    return pieces.compute(partial(train, study, text), pieces_of(study), folder, 1, console)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny study, to see that everything works")
    parser.add_argument("--store", type=Path, default=Path("runs/study-refresh"), help="where pieces are kept")
    parser.add_argument("--out", type=Path, help="where results go; by default here, or to the store if --quick")
    parser.add_argument("--no-figure", action="store_true", help="leave the figure out, which needs matplotlib")
    options = parser.parse_args(arguments)
    study = QUICK if options.quick else Study()
    folder = options.store / study.fingerprint()
    console = Console()
    begun = time.monotonic()
    paths = compute(study, folder, console)
    out = options.out or (folder if options.quick else Path(__file__).parent)
    result = report.summarise(study, paths)
    write(result, out, report.tables(result), None if options.no_figure else report.draw)
    console.print(f"{out / 'result.json'}  ({(time.monotonic() - begun) / 60:.1f} min)", highlight=False)


if __name__ == "__main__":
    main()
