"""The command of a study: its settings, where its pieces are kept and where its results go."""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.results import write

Compute = Callable[[Any, Path, int, Console], Mapping[Any, Path]]


def fingerprint(study: Any, but: Sequence[str]) -> str:
    """A hash of the settings that decide a piece beside its name: all `but` these. What is stored is only used again
    with the same."""
    settings = {name: value for name, value in asdict(study).items() if name not in but}
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def carry_out(
    name: str, about: str, study: Any, quick: Any, compute: Compute, arguments: list[str] | None, workers: int = 2
) -> None:
    """Carry out a study, the whole or its quick one, and write its results.

    Args:
        name: of the study; in its module `report` `summarise(study, paths)` is the result, `tables(result)` are
            the tables of its README, `draw(result, path)` writes the figure, `headline(result)` is what the project's
            README says of it, in a line.
        compute: compute(study, folder, workers, console) brings all pieces into the folder, and returns their paths.
    """
    report = import_module(f"experiments.{name}.report")
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny study, to see that everything works")
    parser.add_argument("--store", type=Path, default=Path(f"runs/study-{name}"), help="where pieces are kept")
    parser.add_argument("--out", type=Path, help="where results go; by default here, or to the store if --quick")
    parser.add_argument("--workers", type=int, default=workers, help="processes, of one thread each")
    parser.add_argument("--no-figure", action="store_true", help="leave the figure out, which needs matplotlib")
    options = parser.parse_args(arguments)
    chosen, console, begun = quick if options.quick else study, Console(), time.monotonic()
    folder = options.store / chosen.fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    if not options.no_figure and find_spec("matplotlib") is None:
        parser.error("the figure needs matplotlib: run it by make, or give --no-figure")
    paths = compute(chosen, folder, options.workers, console)
    out = options.out or (folder if options.quick else Path(str(report.__file__)).parent)
    result = report.summarise(chosen, paths)
    if not options.quick and options.out is None:
        tell(name, report.headline(result))
    write(result, out, report.tables(result), None if options.no_figure else report.draw)
    console.print(f"{out / 'result.json'}  ({(time.monotonic() - begun) / 60:.1f} min)", highlight=False)


def tell(name: str, headline: str, page: Path = Path(__file__).parents[1] / "README.md") -> None:
    """Put the line into the project's README, in its table of studies."""
    link = f"| [{name}](experiments/{name}/README.md) |"
    lines = page.read_text("utf-8").splitlines()
    (at,) = [k for k, line in enumerate(lines) if line.startswith(link)]
    question = lines[at].removeprefix(link).partition("|")[0].strip()
    lines[at] = f"{link} {question} | {headline} |"
    page.write_text("\n".join(lines) + "\n", "utf-8")
