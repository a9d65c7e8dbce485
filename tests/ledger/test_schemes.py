"""Values of other schemes beside a run's own: found by name, read with the run's examples, by every query."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from inrun.ledger import Ledger, LedgerError, LedgerWriter, write_examples
from inrun.ledger.totals import usable

NAMES = {"replay-h0": 0, "replay-h0.5": 0.5, "replay-h2": 2, "replay-h10": 10, "replay": None}


def write(folder: Path, run: dict[str, Any], factor: float, target: str = "math") -> None:
    with LedgerWriter(folder, run, part_rows=4) as writer:
        for step in (1, 2, 3):
            row = {"target": target, "adjoint": factor * step, "hessian_error": None if step < 3 else 1e-3}
            values = np.array([1.0, -0.5 * step, 0.25])
            writer.book(step, ["a", "b", f"c{step}"], {target: factor * values}, [row])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of the scheme path and five replays, each with larger values; the full one has a target of its own."""
    run = tmp_path / "run"
    write(run, {"scheme": "path", "targets": {"math": {}}}, 1.0)
    for factor, (name, horizon) in enumerate(reversed(NAMES.items()), start=2):
        target = "later" if name == "replay" else "math"
        told: dict[str, Any] = {"scheme": "replay", "horizon": horizon, "targets": {target: {}}}
        write(run / "schemes" / name, told, factor, target)
    write_examples(run, pl.DataFrame({"id": ["a", "b", "c1"], "domain": ["x", "y", "x"]}))
    return run


def test_schemes_are_listed_by_horizon_the_full_replay_last(folder: Path) -> None:
    (folder / "schemes" / ".replay-h5.tmp").mkdir()
    (folder / "schemes" / "replay-h7").mkdir()  # begun, without a run.json yet
    assert Ledger(folder).schemes == Ledger(folder, "replay").schemes == list(NAMES)


def test_every_query_answers_with_the_schemes_values_and_the_runs_examples(folder: Path) -> None:
    own, other = Ledger(folder), Ledger(folder, "replay-h10")
    assert (other.scheme, other.run["horizon"], other.home) == ("replay-h10", 10, folder)
    tripled = pl.col("value") * 3
    for query in (
        lambda of: of.values("math"),
        lambda of: of.top(3),
        lambda of: of.bottom(3, "math"),
        lambda of: of.by("domain").drop("mean"),
        lambda of: of.timeline("domain", 3),
        lambda of: of.scan().collect(),
    ):
        assert query(other).equals(query(own).with_columns(tripled))
    assert other.top(1)["domain"].to_list() == ["x"]
    assert other.distribution("math", 4)["count"].to_list() == own.distribution("math", 4)["count"].to_list()
    assert other.steps().select("adjoint", "hessian_error").rows() == [(3.0, None), (6.0, None), (9.0, 1e-3)]
    assert own.modules("math").is_empty()
    assert other.token_values("a", "math") is None


def test_a_scheme_has_targets_of_its_own(folder: Path) -> None:
    replay = Ledger(folder, "replay")
    assert replay.targets == ["later"]
    with pytest.raises(LedgerError, match=r"replay: there is no target 'math'; the targets are: later\."):
        replay.values("math")


def test_totals_of_a_scheme_are_kept_with_it(folder: Path) -> None:
    ledger = Ledger(folder, "replay-h2")
    before = ledger.values()
    ledger.compact()
    assert usable(folder / "schemes" / "replay-h2") is not None
    assert usable(folder) is None
    assert ledger.values().equals(before)
    assert ledger.by("domain", "math")["domain"].to_list() == ["x", None, "y"]


def test_the_in_run_schemes_own_name_is_the_in_run_values(folder: Path) -> None:
    ledger = Ledger(folder, "path")
    assert ledger.scheme is None
    assert ledger.folder == folder
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "scheme": None, "identity": {"scheme": "first"}}))
    with pytest.raises(LedgerError, match="no scheme 'path'"):
        Ledger(folder, "path")


@pytest.mark.parametrize("name", ["replay-h5", "", ".", "..", "../run", "../schemes/replay", "replay/", "/"])
def test_a_scheme_that_is_not_there_is_answered_with_those_that_are(folder: Path, name: str) -> None:
    with pytest.raises(LedgerError, match=r"the schemes are: path \(in-run\), replay-h0, .*, replay\.$"):
        Ledger(folder, name)


def test_where_there_is_none_the_command_that_writes_one_is_named(tmp_path: Path) -> None:
    write(tmp_path, {}, 1.0)
    assert Ledger(tmp_path).schemes == []
    with pytest.raises(LedgerError, match=r"no scheme 'replay'; .*; `inrun replay .*` writes one\."):
        Ledger(tmp_path, "replay")


def test_a_schemes_broken_files_are_named(folder: Path) -> None:
    ledger = Ledger(folder, "replay-h2")
    part = sorted((folder / "schemes" / "replay-h2" / "values").iterdir())[0]
    part.write_bytes(b"")
    with pytest.raises(LedgerError, match=f"schemes/replay-h2/values/{part.name}"):
        ledger.values("math")
    (folder / "examples.parquet").write_bytes(b"")
    with pytest.raises(LedgerError, match=r"run/examples\.parquet cannot be read"):
        Ledger(folder, "replay-h10").by("domain")
