"""What attribution costs: the time of a step with values over that of a plain one, in alternation, in one process.

Every round takes one step of every variant, in a turning order; the first rounds are not counted. Printed, for every
model, are the medians over the rounds with the range of their middle half, and the most memory that a process of its
own came to hold (on a GPU: that the device's allocator gave out). The folder --out gets result.json, table.txt and
figure.svg, cost against accuracy. Ctrl-C keeps what was measured so far.

ratio: to the plain step of the same round, under the same optimizer. beyond: the ratio, less what the targets' own
forward and backward passes cost in the same round (of `second`: its double backward passes too).
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import figure, report
from benchmarks.cases import Case, asked, quick, standard
from benchmarks.measure import LEAST, Alternation, memory, remembered
from benchmarks.models import WORKLOADS
from benchmarks.progress import Shown
from benchmarks.variants import VARIANTS


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of names with commas between them, all of them known."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known: choose from {', '.join(known)}")
        return found

    return parse


def numbers(text: str) -> list[int]:
    """Numbers with commas between them, 1 or more."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: 1 or more")
    return found


def measure(cases: Sequence[Case], device: str, out: Path, with_memory: bool, console: Console) -> list[report.Row]:
    """Every case, written as it grows; Ctrl-C ends it."""
    machine = report.machine(device)
    console.print(report.headline(machine))
    found: dict[int, report.Row] = {}
    with contextlib.suppress(KeyboardInterrupt), Shown(console, cases, with_memory) as shown:
        for number, case in enumerate(cases, 1):
            shown.case(f"{number}/{len(cases)}  {case.title}")
            try:
                for row in growing(case, device, with_memory, shown):
                    found[number] = row
                    report.write(out, machine, list(found.values()))
            finally:
                if number in found:
                    console.print("\n" + report.table(found[number]))
    return list(found.values())


def growing(case: Case, device: str, with_memory: bool, shown: Shown) -> Iterator[report.Row]:
    """What is known of a case, again after every round and after its memory."""
    begun = time.monotonic()
    with Alternation(case, device) as running:
        rounds = case.rounds
        while running.counted < rounds:
            started = time.monotonic()
            what = f"round {running.counted + 1} of {rounds}" if running.counted else "first rounds"
            running.round(lambda label, what=what: shown.tell(f"{what}: {label}"))  # type: ignore[misc]
            took = time.monotonic() - started
            if running.counted <= 1:
                fit = (case.seconds - (time.monotonic() - begun)) / took + running.counted
                rounds = min(case.rounds, max(LEAST, int(min(fit, case.rounds))))
            shown.left(took * (rounds - running.counted), len(case.memory))
            if running.counted:
                yield report.summarise(case, running, complete=False)
    for k, of in enumerate(lines := remembered(case, list(running.lines.values())) if with_memory else []):
        shown.left(0.0, len(lines) - k)
        shown.tell(f"memory of {of.line.variant.label}")
        of.gib, of.later_gib = memory(case, device, of.line.key)
    yield report.summarise(case, running, complete=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a short set: a few minutes")
    parser.add_argument("--models", type=names(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--variants", type=names(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--rounds", type=int, help="that count; by default what fits the time of the set")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="bf16 is autocast")
    parser.add_argument("--targets", type=numbers, help="how many, for instance 1,4,16")
    parser.add_argument("--batch", type=numbers, help="examples of a training batch, for instance 4,16,64")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="a folder (runs/bench)")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = asked(
        quick() if options.quick else standard(), options.models, options.variants, options.dtype, options.targets,
        options.batch, options.rounds,
    )  # fmt: skip
    console = Console(highlight=False, markup=False, soft_wrap=True)
    found = measure(cases, device, options.out, not options.no_memory, console)
    files = ["result.json", "table.txt"] if found else []
    if (
        found
        and find_spec("matplotlib") is not None
        and figure.draw(found, figure.errors(), options.out / "figure.svg")
    ):
        files.append("figure.svg")
    console.print(f"\n{options.out}: {', '.join(files) or 'nothing was measured'}")
    whole = len(found) == len(cases) and all(case["complete"] for case in found)
    return 0 if whole else 130


if __name__ == "__main__":
    sys.exit(main())
