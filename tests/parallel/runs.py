"""Runs of tests.parallel.worker by torchrun, and what they left."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from inrun import Ledger
from tests.parallel.worker import Run, stored

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def launched(module: Sequence[str], processes: int, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """What torchrun made of a program, on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, *module], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=timeout
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What the processes themselves wrote of their ends."""
    return "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))[-4000:]


def run_on(processes: int, runs: Sequence[Run], place: Path) -> None:
    """Carry the runs out, all by the same processes."""
    place.mkdir(parents=True, exist_ok=True)
    done = launched(["-m", "tests.parallel.worker", str(stored(list(runs), place / f"{processes}.json"))], processes)
    assert done.returncode == 0, said(done)


def values_of(folder: str | Path) -> pl.DataFrame:
    return Ledger(folder).scan().collect().sort("step", "target", "id")


def apart(one: str | Path, other: str | Path) -> float:
    """How far the values of two ledgers are apart, relative to the largest; they hold the same uses of examples."""
    mine, its = values_of(one), values_of(other)
    keys = ["step", "target", "id"]
    assert mine.select(keys).equals(its.select(keys))
    assert len(mine)
    difference, size = (mine["value"] - its["value"]).abs().max(), its["value"].abs().max()
    assert isinstance(difference, float)
    assert isinstance(size, float)
    return difference / size
