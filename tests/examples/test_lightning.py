"""The Lightning example runs as its docstring says."""

import os
import subprocess
import sys
from pathlib import Path

from inrun import Ledger

ROOT = Path(__file__).parents[2]


def test_lightning_fit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/lightning_fit.py", "--out", str(tmp_path / "run"), "--steps", "16"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "shape: (10, 3)" in done.stdout
    ledger = Ledger(tmp_path / "run" / "values")
    assert ledger.steps("held out").height == 16
    values: dict[str, list[float]] = {"right": [], "wrong": []}
    for name, value, _ in ledger.values("held out").iter_rows():
        values[name.split("-")[0]].append(value)
    wrong, right = values["wrong"], values["right"]
    assert sum(wrong) / len(wrong) < sum(right) / len(right)
