"""examples/sft.py runs as its docstring says."""

import os
import subprocess
import sys
from pathlib import Path

from inrun import Ledger

ROOT = Path(__file__).parents[2]


def test_packed_questions_have_values(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/sft.py", "--out", str(tmp_path / "run"), "--steps", "6"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "CI": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "shape: (10," in done.stdout
    assert "inrun/math/value" in done.stdout  # the trainer's own log
    ledger = Ledger(tmp_path / "run" / "values")
    assert ledger.targets == ["math"]
    assert ledger.steps("math").height == 6
    values = ledger.values("math")
    assert len(values) > 100
    assert set(values["id"].str.split(".").list.first()) == {"math", "operator", "os", "random", "shutil", "statistics"}
