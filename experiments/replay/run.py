"""Whether a replay's values predict really training without examples, and find wrong labels.

    python -m experiments.replay.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished piece is a file in the store; a study that was stopped goes on from there. Results are written to the
folder --out: result.json, the tables of README.md, figure.svg.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from experiments import pieces
from experiments.fidelity.report import write
from experiments.replay import report
from experiments.replay.subsets import work
from experiments.replay.training import QUICK, Study, pieces_of


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny study, to see that everything works")
    parser.add_argument("--store", type=Path, default=Path("runs/study-replay"), help="where pieces are kept")
    parser.add_argument("--out", type=Path, help="where results go; by default here, or to the store if --quick")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--no-figure", action="store_true", help="leave the figure out, which needs matplotlib")
    options = parser.parse_args(arguments)
    study = QUICK if options.quick else Study()
    folder = options.store / study.fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    begun = time.monotonic()
    paths = pieces.compute(partial(work, study), pieces_of(study), folder, options.workers, console)
    out = options.out or (folder if options.quick else Path(__file__).parent)
    result = report.summarise(study, paths)
    write(result, out, report.tables(result), None if options.no_figure else report.draw)
    console.print(f"{out / 'result.json'}  ({(time.monotonic() - begun) / 60:.1f} min)", highlight=False)


if __name__ == "__main__":
    main()
