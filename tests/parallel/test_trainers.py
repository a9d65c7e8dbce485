"""Hugging Face's Trainer and Lightning's on two processes: the values of one; and either number goes on."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inrun import Ledger
from tests.parallel.runs import ROOT, apart, environment, launched, said, values_of
from tests.parallel.trainers import KEPT, LEDGER, STEPS

CHECKPOINTS = {"ddp": f"checkpoint-{KEPT}", "lightning": f"epoch=0-step={KEPT}.ckpt"}


def run(kind: str, processes: int, folder: Path, checkpoint: Path | None = None) -> None:
    program = ["-m", "tests.parallel.trainers", kind, str(folder), *([] if checkpoint is None else [str(checkpoint)])]
    if processes > 1:
        done = launched(program, processes)
    else:
        done = subprocess.run(
            [sys.executable, *program], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, said(done) or done.stderr[-4000:]


@pytest.mark.parametrize("kind", ["ddp", "lightning"])
def test_trainers_on_two_processes(kind: str, tmp_path: Path) -> None:
    several, alone = tmp_path / "several", tmp_path / "alone"
    run(kind, 2, several)
    run(kind, 1, alone)
    assert apart(several / LEDGER, alone / LEDGER) <= 1e-4
    mine, its = (Ledger(folder / LEDGER).steps() for folder in (several, alone))
    assert mine["examples"].to_list() == its["examples"].to_list() == [8] * STEPS
    for column in ("train_loss", "loss", "momentum"):
        assert mine[column].drop_nulls().to_list() == pytest.approx(
            its[column].drop_nulls().to_list(), rel=1e-4, abs=1e-6
        )
    for processes in (1, 2):
        resumed = tmp_path / f"resumed-{processes}"
        shutil.copytree(several, resumed)  # with steps after the checkpoint that nobody keeps
        run(kind, processes, resumed, resumed / "checkpoints" / CHECKPOINTS[kind])
        assert apart(resumed / LEDGER, several / LEDGER) <= 1e-4
        assert Ledger(resumed / LEDGER).steps()["step"].to_list() == list(range(1, STEPS + 1))
    assert values_of(tmp_path / "resumed-2" / LEDGER).equals(values_of(several / LEDGER))
    if kind == "ddp":  # what is logged is of all processes
        logged = [[float(x) for x in (f / "logged.txt").read_text().split()] for f in (several, alone)]
        assert logged[0] == pytest.approx(mine["value"].to_list())
        assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-7)
