"""A run goes on from its checkpoint, on as many processes or on another number, also after one was killed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from inrun import Ledger
from tests.parallel.runs import apart, launched, run_on, values_of
from tests.parallel.worker import Run, stored

STEPS, KEPT = 6, 3


def interrupted(run: Run, name: str) -> Run:
    """The same in another folder, where there are steps after the checkpoint that nobody keeps."""
    place = Path(run.folder).with_name(name)
    shutil.copytree(run.folder, place)
    return going_on(replace(run, folder=str(place)))


def going_on(run: Run) -> Run:
    return replace(run, stop=0, checkpoint=str(Path(run.folder) / "checkpoint.pt"))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_every_continued_run_has_the_ledger_of_one_that_was_not_interrupted(wrap: str, tmp_path: Path) -> None:
    refresh = {"scheme": "first", "refresh": 2}  # a gradient is in the checkpoint
    whole = Run(str(tmp_path / "whole"), 2, wrap=wrap, steps=STEPS, keep=KEPT, settings=refresh)
    run_on(2, [whole], tmp_path)
    alone, as_one = replace(whole, folder=str(tmp_path / "alone")), interrupted(whole, "two-then-one")
    run_on(1, [alone, as_one], tmp_path)
    killed = replace(whole, folder=str(tmp_path / "killed"), stop=5)
    done = launched(["-m", "tests.parallel.worker", str(stored([killed], tmp_path / "killed.json"))], 2, timeout=120)
    assert done.returncode != 0
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    as_two, again = interrupted(alone, "one-then-two"), interrupted(whole, "two-then-two")
    run_on(2, [as_two, again, going_on(killed)], tmp_path)
    for run, ranks in ((as_one, 1), (as_two, 2), (again, 2), (killed, 2)):
        assert apart(run.folder, whole.folder) <= 1e-9
        mine, its = Ledger(run.folder).steps(), Ledger(whole.folder).steps()
        assert mine.select("step", "target", "examples").equals(its.select("step", "target", "examples"))
        assert float((mine["value"] - its["value"]).abs().max() or 0) <= 1e-12  # type: ignore[arg-type]
        last = (Path(run.folder) / "values").glob(f"*-00000000{STEPS}-*")
        assert {path.name.rpartition("-r")[2] for path in last} == {f"{rank}.parquet" for rank in range(ranks)}
    for run in (again, killed):
        assert values_of(run.folder).equals(values_of(whole.folder))
