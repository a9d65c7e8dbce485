"""The examples for several processes run as their docstrings say."""

from pathlib import Path

import polars as pl

from inrun import Ledger
from tests.parallel.runs import launched, said


def run(name: str, out: Path, *arguments: str, processes: int = 2) -> None:
    done = launched([f"examples/{name}.py", "--out", str(out), *arguments], processes)
    assert done.returncode == 0, said(done)
    assert done.stdout.count("shape:") == 1


def check(ledger: Ledger, steps: int, examples: int, target: str) -> None:
    """Every process booked its own, and the books hold them all."""
    rows = ledger.steps(target)
    assert rows["step"].to_list() == list(range(1, steps + 1))
    assert rows["examples"].to_list() == [examples] * steps
    booked = ledger.scan().filter(pl.col("target") == target).group_by("step").agg(pl.col("value").sum(), pl.len())
    per_step = booked.collect().sort("step")
    assert per_step["len"].to_list() == [examples] * steps
    assert (per_step["value"] - rows["value"]).abs().max() < 1e-9  # type: ignore[operator]
    assert {path.stem[-2:] for path in (ledger.folder / "values").iterdir()} == {"r0", "r1"}


def test_replicated_and_accelerated(tmp_path: Path) -> None:
    run("ddp", tmp_path / "ddp", "--steps", "5")
    check(Ledger(tmp_path / "ddp"), 5, 16, "code")
    run("accelerate_loop", tmp_path / "accelerate", "--steps", "5")
    check(Ledger(tmp_path / "accelerate"), 5, 64, "held out")


def test_sharded_and_resumed_with_another_number_of_processes(tmp_path: Path) -> None:
    run("fsdp2", tmp_path / "whole", "--steps", "6")
    check(Ledger(tmp_path / "whole"), 6, 8, "prose")
    run("fsdp2", tmp_path / "resumed", "--steps", "3", processes=1)
    run("fsdp2", tmp_path / "resumed", "--steps", "6", "--resume")
    mine, its = (Ledger(tmp_path / name).scan().collect().sort("step", "target", "id") for name in ("resumed", "whole"))
    assert mine.drop("value").equals(its.drop("value"))
    assert (mine["value"] - its["value"]).abs().max() < 1e-3 * its["value"].abs().max()  # type: ignore[operator]
