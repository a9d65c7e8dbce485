"""The fidelity study, at its smallest, from text to result."""

from pathlib import Path

import pytest

from experiments.fidelity import run, training
from experiments.results import table_rows
from tests.experiments.quick import carried_out, gone_on


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    error = {(c["optimizer"], c["step"], c["scheme"]): c["relative"][0] for c in table_rows(result["schemes"])}
    for optimizer in ("sgd", "adamw"):  # large steps
        assert error[optimizer, "12", "path 4"] < 0.1
        assert error[optimizer, "12", "path 4"] < 0.5 * error[optimizer, "12", "first"]
    assert error["sgd", "12", "first"] == error["sgd", "12", "sgd-proxy"]
    assert error["adamw", "12", "first"] < 0.5 * error["adamw", "12", "sgd-proxy"]
    assert error["adamw", "1", "path 4"] > 1  # a sign: no scheme is close
    for book in table_rows(result["books"]):
        accounts = sum(book[name] for name in ("value", "momentum", "decay", "unexplained"))
        assert accounts == pytest.approx(book["drop"], abs=1e-3)
        assert abs(book["unexplained"]) < 0.05 * book["drop"]
    assert "| AdamW | 0.02 |" in page

    repeated = gone_on(run, tmp_path, "game-sgd-0.5-seed0-step12.json")
    for one, other in zip(table_rows(result["schemes"]), table_rows(repeated["schemes"]), strict=True):
        assert one | {"time": 0} == other | {"time": 0}
    assert all(result[name] == repeated[name] for name in result if name != "schemes")


def test_another_study_finds_no_pieces() -> None:
    quick = training.QUICK.fingerprint()
    assert training.Study().fingerprint() != quick
