"""Every example runs as its docstring says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inrun import Ledger

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "ledger", "targets"), [("raw_loop", ".", ["code", "prose"]), ("trainer", "values", ["first two files"])]
)
def test_example(name: str, ledger: str, targets: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", "--out", str(tmp_path / "run"), "--steps", "6"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "shape:" in done.stdout
    found = Ledger(tmp_path / "run" / ledger)
    assert sorted(found.targets) == targets
    assert found.steps(targets[0]).height == 6
