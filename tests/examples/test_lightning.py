"""The Lightning example runs as its docstring says."""

from pathlib import Path

from inrun import Ledger
from tests.examples.running import run


def test_lightning_fit(tmp_path: Path) -> None:
    printed = run("lightning_fit", "--out", str(tmp_path / "run"), "--steps", "16")
    assert "shape: (10, 3)" in printed
    ledger = Ledger(tmp_path / "run" / "values")
    assert ledger.steps("held out").height == 16
    values: dict[str, list[float]] = {"right": [], "wrong": []}
    for name, value, _ in ledger.values("held out").iter_rows():
        values[name.split("-")[0]].append(value)
    wrong, right = values["wrong"], values["right"]
    assert sum(wrong) / len(wrong) < sum(right) / len(right)
