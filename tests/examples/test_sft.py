"""examples/sft.py runs as its docstring says."""

from pathlib import Path

from inrun import Ledger
from tests.examples.running import run


def test_packed_questions_have_values(tmp_path: Path) -> None:
    printed = run("sft", "--out", str(tmp_path / "run"), "--steps", "6")
    assert "shape: (10," in printed
    assert "inrun/math/value" in printed  # the trainer's own log
    ledger = Ledger(tmp_path / "run" / "values")
    assert ledger.targets == ["math"]
    assert ledger.steps("math").height == 6
    values = ledger.values("math")
    assert len(values) > 100
    assert set(values["id"].str.split(".").list.first()) == {"math", "operator", "os", "random", "shutil", "statistics"}
