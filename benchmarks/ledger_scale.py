"""The ledger at the size of a large run: bytes, and the time and memory of writing it, of its totals, of its queries.

python -m benchmarks.ledger_scale [--examples 100_000_000] [--targets 16] [--folder FOLDER]

Books every example once, in shuffled order, through LedgerWriter, into a temporary folder that is removed at the end.
Every query is a process of its own; *peak* is its resident memory at most, *processor* the seconds of all its threads.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from inrun.ledger import Ledger, LedgerWriter, write_examples

_STRIDE = 1_000_003  # prime: so many ids lie between one example and the next
_DOMAINS = 37
_MADE_AT_ONCE = 2**22


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger_scale", description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000_000)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1024, help="examples of a step")
    parser.add_argument("--folder", type=Path, help="where there is room for 50 bytes an example and target")
    parser.add_argument("--ask", choices=[*_QUERIES], help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args(arguments)
    if options.ask:
        found = _measured(lambda: _QUERIES[options.ask](Ledger(options.folder)))
        found["answer"] = _check(options.ask, options.folder, options.examples, found["answer"])
        print(json.dumps(found))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="inrun-ledger-", dir=options.folder))
    try:
        _run(folder, options.examples, options.targets, options.batch)
    finally:
        shutil.rmtree(folder)
    return 0


def _run(folder: Path, examples: int, targets: int, batch: int) -> None:
    from benchmarks.report import processor  # which takes torch into memory

    values = examples * targets
    print(f"{processor()}, {os.cpu_count()} threads, polars {pl.__version__}, load {os.getloadavg()[0]:.1f}")
    print(f"{examples:,} examples, {targets} targets: {values:,} values, batches of {batch}")
    written = _measured(lambda: write(folder, examples, targets, batch))
    size, parts = _size(folder / "values")
    seconds = written["answer"]
    print(_line("write", written) + f"  {values / seconds / 1e6:.1f} M values/s booked")
    print(f"{'':18}{size / values:.2f} bytes a value, {size / 1e9:.3g} GB in {parts} parts")
    table = pl.select(id=pl.int_range(examples)).lazy().with_columns(domain=pl.col("id") % _DOMAINS)
    write_examples(folder, table.with_columns(domain=pl.format("domain {}", "domain")))
    for name in _QUERIES:
        command = [sys.executable, "-m", "benchmarks.ledger_scale", "--ask", name, "--folder", str(folder)]
        done = subprocess.run([*command, "--examples", str(examples)], stdout=subprocess.PIPE, check=True, text=True)
        found = json.loads(done.stdout)
        print(_line(name, found) + f"  {found['answer']}", flush=True)
        if name == "compact":
            size, files = _size(folder / "totals")
            print(f"{'':18}{size / values:.2f} bytes a value, {size / 1e9:.3g} GB in {files} files")


def write(folder: Path, examples: int, targets: int, batch: int) -> float:
    """Book every example once; the seconds that took, without those of making up values."""
    made, names, booked = np.random.default_rng(0), [f"target-{k}" for k in range(targets)], 0.0
    with LedgerWriter(folder, {"targets": names}) as writer:
        for step, first in enumerate(range(0, examples, batch), start=1):
            ids = np.arange(first, min(first + batch, examples)) * _STRIDE % examples
            values = {name: made.standard_normal(len(ids)) * 1e-3 for name in names}
            rows = [{"target": name, "loss": 3.0, "value": float(values[name].sum())} for name in names]
            began = time.perf_counter()
            writer.book(step, ids, values, rows)
            booked += time.perf_counter() - began
        began = time.perf_counter()
    return booked + time.perf_counter() - began


def _check(name: str, folder: Path, examples: int, found: Any) -> str:
    """The answer is what was booked; how large it is."""
    if name == "compact":
        return ""
    if name == "values" and (found.height != examples or not found["value"].is_sorted(descending=True)):
        raise AssertionError(f"{found.height} of {examples} examples, or they are not sorted")
    if name == "by":
        booked = Ledger(folder).steps(_TARGET)["value"].sum()
        if found["count"].sum() != examples or abs(found["value"].sum() - booked) > 1e-9:
            raise AssertionError(f"the groups come to {found['value'].sum()}, but {booked} was booked")
    return f"{found.height:,} rows"


_TARGET = "target-0"
_QUERIES: dict[str, Callable[[Ledger], Any]] = {
    "compact": lambda ledger: ledger.compact(),
    "values": lambda ledger: ledger.values(_TARGET),
    "top": lambda ledger: ledger.top(20, _TARGET),
    "by": lambda ledger: ledger.by("domain", _TARGET),
}


def _measured(work: Callable[[], Any]) -> dict[str, Any]:
    before, began = _processor_seconds(), time.perf_counter()
    answer = work()
    return {
        "answer": answer,
        "seconds": time.perf_counter() - began,
        "processor": _processor_seconds() - before,
        "peak": _peak(),
    }


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak() -> int:
    """Bytes. What getrusage tells may be those of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _size(folder: Path) -> tuple[int, int]:
    files = list(folder.rglob("*.parquet"))
    return sum(path.stat().st_size for path in files), len(files)


def _line(name: str, of: dict[str, Any]) -> str:
    return f"{name:8}{of['seconds']:8.1f} s{of['processor']:8.1f} s processor{of['peak'] / 1e9:7.2f} GB peak"


if __name__ == "__main__":
    sys.exit(main())
