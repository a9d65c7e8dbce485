"""Values by module and by token: what may be booked, and what the ledger says of it."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from inrun.ledger import Ledger, LedgerError, LedgerWriter, write_examples
from tests.ledger.rows import RUN, assert_holds, book, names


def test_they_read_back_with_any_engine(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        book(writer, 1, 2, parts=True)
        book(writer, 3)  # without parts
        book(writer, 4, parts=True)
    modules = pl.read_parquet(tmp_path / "modules" / "*.parquet")
    assert modules.schema == {
        "step": pl.Int64, "id": pl.String, "target": pl.String, "module": pl.String, "value": pl.Float64,
    }  # fmt: skip
    tokens = pl.read_parquet(tmp_path / "token_values" / "*.parquet")
    assert tokens.schema == {
        "step": pl.Int64, "id": pl.String, "target": pl.String, "token_values": pl.List(pl.Float64),
    }  # fmt: skip
    keys = ["step", "id", "target"]
    values = Ledger(tmp_path).scan().filter(pl.col("step") != 3).group_by(keys).agg(pl.col("value").sum()).sort(keys)
    for part in (
        modules.group_by(keys).agg(pl.col("value").sum()),
        tokens.group_by(keys).agg(pl.col("token_values").list.sum().sum().alias("value")),
    ):
        assert part.sort(keys).equals(values.collect())


def test_a_run_without_them_has_no_folder_for_them(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        book(writer, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "steps", "values"]
    ledger = Ledger(tmp_path)
    assert ledger.modules("math").schema == {"id": pl.String, "module": pl.String, "value": pl.Float64}
    assert ledger.modules("math").height == 0
    assert ledger.token_values("e1", "math") is None


def test_they_count_for_when_a_part_is_written(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, RUN, part_rows=6 * (1 + 2 + 1))
    book(writer, 1, parts=True)
    book(writer, 2)
    writer.flush()
    assert names(tmp_path, "values") == ["000000001-000000001-r0.parquet", "000000002-000000002-r0.parquet"]
    assert names(tmp_path, "modules") == names(tmp_path, "token_values") == ["000000001-000000001-r0.parquet"]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Ids 7 and 8, twice each, and 9 once; 8 with another number of tokens."""
    with LedgerWriter(tmp_path, {"targets": ["math", "code"]}) as writer:
        for step, ids in ((1, [7, 8]), (2, [7, 8, 9])):
            n = len(ids)
            values = np.arange(1.0, n + 1)
            tokens = [np.full(3 + (step == 2 and i == 8), value) for i, value in zip(ids, values, strict=True)]
            writer.book(
                step,
                ids,
                {"math": values, "code": -values},
                [],
                {"math": {"a": values - 3, "b": np.full(n, 3.0)}, "code": {"a": -values, "b": np.zeros(n)}},
                {"math": tokens, "code": [-one for one in tokens]},
            )
    write_examples(tmp_path, pl.DataFrame({"id": [7, 8], "kind": ["x", "y"]}))
    return Ledger(tmp_path)


def test_values_by_module(ledger: Ledger) -> None:
    assert ledger.modules("math").rows() == [
        (7, "b", 6.0), (8, "b", 6.0), (9, "b", 3.0), (9, "a", 0.0), (8, "a", -2.0), (7, "a", -4.0),
    ]  # fmt: skip
    every = ledger.modules()
    assert every.columns == ["id", "target", "module", "value"]
    totals = every.group_by("id", "target").agg(pl.col("value").sum()).sort("id", "target")
    assert totals.equals(ledger.values().drop("count").sort("id", "target"))


def test_values_by_module_and_group(ledger: Ledger) -> None:
    assert ledger.modules("math", by="kind").rows() == [
        ("x", "b", 6.0), ("y", "b", 6.0), (None, "b", 3.0), (None, "a", 0.0), ("y", "a", -2.0), ("x", "a", -4.0),
    ]  # fmt: skip
    with pytest.raises(LedgerError, match="no column 'color'"):
        ledger.modules("math", by="color")
    with pytest.raises(LedgerError, match="no target 'art'"):
        ledger.modules("art")


def test_values_by_token(ledger: Ledger) -> None:
    """Added up over an example's uses; of one whose length changed there are none."""
    found = ledger.token_values(7, "math")
    assert found is not None
    assert found.tolist() == [2.0, 2.0, 2.0]
    found = ledger.token_values(9, "code")
    assert found is not None
    assert found.tolist() == [-3.0, -3.0, -3.0]
    assert ledger.token_values(8, "math") is None
    assert ledger.token_values(10, "math") is None
    with pytest.raises(LedgerError, match="no target 'art'"):
        ledger.token_values(7, "art")


def test_a_resumed_run_without_a_cut_goes_on(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        book(writer, 1, 2, 3, parts=True)
    with LedgerWriter(tmp_path, RUN, resume=True) as writer:
        writer.cut(2)
        assert_holds(tmp_path, 2, parts=True)
        book(writer, 3, 4, parts=True)
        writer.cut(3)
    assert_holds(tmp_path, 3, parts=True)


ONE = {"math": {"a": np.array([1.0])}}


@pytest.mark.parametrize(
    ("by_module", "tokens", "message"),
    [
        ({"math": {"a": np.array([1.0])}}, {}, "other modules for one target"),
        ({**ONE, "code": {"b": np.array([1.0])}}, {}, "other modules for one target"),
        ({**ONE, "code": {"a": np.array([1.0, 2.0])}}, {}, r"target 'code': values of shape \(2,\) for 1 ids"),
        ({**ONE, "code": {"a": np.array([np.nan])}}, {}, "value of id x .* is nan"),
        ({"math": {3: np.array([1.0])}, "code": {3: np.array([1.0])}}, {}, "a module is named 3"),
        ({}, {"math": [np.ones(2)]}, "for every target and id"),
        ({}, {"math": [np.ones(2)], "code": [np.ones(3)]}, "as many for one target as for another"),
        ({}, {"math": [np.ones(0)], "code": [np.ones(0)]}, "one or more"),
        ({}, {"math": [np.ones((1, 2))], "code": [np.ones((1, 2))]}, "a list of numbers"),
        ({}, {"math": [np.ones(2)], "code": [np.array([1.0, np.inf])]}, "a token's value is not finite"),
    ],
)
def test_what_cannot_be_booked(tmp_path: Path, by_module: Any, tokens: Any, message: str) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        values = {"math": np.array([1.0]), "code": np.array([1.0])}
        with pytest.raises(LedgerError, match=message):
            writer.book(1, ["x"], values, [], by_module, tokens)
        assert writer.last_step == 0


def test_a_damaged_part_is_named(ledger: Ledger) -> None:
    (path,) = (ledger.folder / "modules").iterdir()
    path.write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(LedgerError, match=r"modules.*cannot be read"):
        ledger.modules("math")
