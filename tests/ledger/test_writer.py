"""The writer: what may be booked, and what is on disk then."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from inrun.ledger import Ledger, LedgerError, LedgerWriter, write_examples
from inrun.ledger import examples as examples_table
from tests.ledger.rows import RUN, assert_holds, book, book_unasked, names, rows_in, rows_of


def test_what_is_booked_reads_back_with_any_engine(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        book(writer, 1)
        writer.book(
            4,
            ["a"],
            {"math": np.array([-0.5])},
            [
                {"target": "math", "loss": 2.5, "value": np.float32(-0.5), "momentum": 0.25},
                {"target": "code", "loss": float("nan"), "skipped": np.True_},
            ],
        )
        assert writer.last_step == 4
    values = pl.read_parquet(tmp_path / "values" / "*.parquet")
    assert values.schema == {"step": pl.Int64, "id": pl.String, "target": pl.String, "value": pl.Float64}
    assert values.rows() == [*rows_of(1), (4, "a", "math", -0.5)]
    steps = pl.read_parquet(tmp_path / "steps" / "*.parquet").filter(step=4)
    assert steps.select("target", "examples", "value", "momentum", "decay", "skipped").rows() == [
        ("math", 1, -0.5, 0.25, None, False),
        ("code", 1, None, None, None, True),
    ]
    assert json.loads((tmp_path / "run.json").read_text()) == {**RUN, "format": 1}


def test_a_part_is_written_when_its_rows_are_there(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, RUN, part_rows=12)
    book_unasked(writer, 1, 2, 3)
    assert names(tmp_path, "values") == names(tmp_path, "steps") == ["000000001-000000002-r0.parquet"]
    writer.flush()
    writer.flush()
    assert names(tmp_path, "values")[1:] == ["000000003-000000003-r0.parquet"]
    assert_holds(tmp_path, 3)


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        (np.array([3, 1]), [3, 1]),
        ([np.int32(3), 2**63 - 1], [3, 2**63 - 1]),
        ((np.uint8(3), -(2**63)), [3, -(2**63)]),
        (np.array(["x", "ü"]), ["x", "ü"]),
        (["", "x"], ["", "x"]),
    ],
)
def test_ids_may_come_from_numpy(tmp_path: Path, ids: Any, kept: list[Any]) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        writer.book(1, ids, {"math": np.array([1.0, 2.0])}, [])
    assert Ledger(tmp_path).scan().collect()["id"].to_list() == kept


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": 2}, "step 2 is booked already.*load_state_dict"),
        ({"step": 0}, "count from 1"),
        ({"step": 2.5}, "whole number"),
        ({"ids": ["a", 1]}, r"id 1 \(position 1\) is a int"),
        ({"ids": ["a", True]}, "id True"),
        ({"ids": [True, False]}, "id True"),
        ({"ids": ["a", None]}, "id None"),
        ({"ids": [1.0, 2.0]}, "id 1.0"),
        ({"ids": np.array([1.0, 2.0])}, "id 1.0"),
        ({"ids": [1, 2]}, "ids are Int64.*this run's are String"),
        ({"ids": [1, 2**63]}, "9223372036854775808.*beyond 64 bits"),
        ({"ids": np.array([2**64 - 1, 1], dtype=np.uint64)}, "beyond 64 bits"),
        ({"ids": ["a", "\ud800"]}, "position 1.*not valid Unicode"),
        ({"ids": np.array([["a", "b"]])}, "give a list"),
        ({"ids": "ab"}, "give a list"),
        ({"ids": ["a"]}, r"shape \(2,\) for 1 ids"),
        ({"values": {"math": np.ones((2, 1))}}, r"shape \(2, 1\) for 2 ids"),
        ({"values": {"math": np.array([1.0, np.nan])}}, "id b.*is nan.*skipped"),
        ({"values": {"math": np.array(["x", "y"])}}, "not numbers"),
        ({"values": {3: np.ones(2)}}, "a target is named 3"),
        ({"values": {"news": np.ones(2)}}, "'news' has values but no row in steps"),
        ({"steps": [{"target": "math", "lost": 1.0}]}, "unknown columns.*lost.*its columns are step, target"),
        ({"steps": [{"target": "math", "step": 4}]}, "step 3: steps has a row of step 4"),
        ({"steps": [{"target": "math"}, {"target": "math"}]}, "two rows of one target"),
        ({"steps": [{"loss": 1.0}]}, "target=None"),
        ({"steps": [{"target": "math", "loss": "low"}]}, "loss='low'"),
        ({"steps": [{"target": "math", "loss": [1.0]}]}, "loss=.*give a number"),
        ({"steps": [{"target": "math", "examples": 2.5}]}, "examples=2.5"),
        ({"steps": [{"target": "math", "skipped": 1}]}, "skipped=1"),
    ],
)
def test_a_wrong_booking_is_refused_and_nothing_is_buffered(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        book(writer, 1, 2)
        given = {
            "step": 3,
            "ids": ["a", "b"],
            "values": {"math": np.ones(2)},
            "steps": [{"target": "math"}],
            **changed,
        }
        with pytest.raises(LedgerError, match=message):
            writer.book(**given)
        assert writer.last_step == 2
        book(writer, 3)
    assert_holds(tmp_path, 3)


def test_a_step_without_values_is_booked(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        writer.book(1, [], {"math": np.array([])}, [{"target": "math", "skipped": True}])
        writer.book(2, [1, 2], {}, [{"target": "math", "skipped": True}])
    assert rows_in(tmp_path) == []
    assert Ledger(tmp_path).steps()["examples"].to_list() == [0, 2]
    assert LedgerWriter(tmp_path, RUN, resume=True).last_step == 2


def test_no_booking_after_close(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, RUN)
    writer.close()
    writer.close()
    with pytest.raises(LedgerError, match=r"after close\(\)"):
        book(writer, 1)


def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        book(writer, 1)
    with pytest.raises(LedgerError, match="another run: choose another folder, or resume"):
        LedgerWriter(tmp_path, RUN)
    other = {**RUN, "identity": {"scheme": "first", "optimizer": "SGD"}}
    with pytest.raises(LedgerError, match=r"scheme: 'path' then, 'first' now; nodes: 1 .*; optimizer: None"):
        LedgerWriter(tmp_path, other, resume=True)
    (tmp_path / "run.json").rename(tmp_path / "run.txt")
    for resume in (False, True):
        with pytest.raises(LedgerError, match=r"parts of a ledger, without its run\.json"):
            LedgerWriter(tmp_path, RUN, resume=resume)
    (tmp_path / "run.txt").rename(tmp_path / "run.json")
    assert_holds(tmp_path, 1)


def test_resume_keeps_what_the_first_run_said_of_itself(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"of the trainer")
    run = {"targets": ("code", "math"), "identity": {"betas": (0.9, 0.95)}, "host": "a"}
    LedgerWriter(tmp_path, run, resume=True).close()
    LedgerWriter(tmp_path, {**run, "host": "b"}, resume=True).close()
    assert Ledger(tmp_path).run["host"] == "a"


def test_a_run_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="does not fit JSON"):
        LedgerWriter(tmp_path / "run", {"model": object()})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="file/run: the ledger could not be begun"):
        LedgerWriter(tmp_path / "file" / "run", RUN)


@pytest.mark.parametrize("step", range(12))
def test_cut_forgets_the_later_steps_on_disk_and_in_memory(tmp_path: Path, step: int) -> None:
    writer = LedgerWriter(tmp_path, RUN)
    book(writer, 1, 2, 3)
    writer.flush()
    book(writer, 4, 5, 6, 7)
    writer.flush()
    book(writer, 8, 9, 10)
    writer.cut(step)
    last = min(step, 10)
    assert writer.last_step == last
    book(writer, *range(last + 1, last + 3))
    writer.close()
    assert_holds(tmp_path, last + 2)


def test_cutting_all_lets_the_run_change_the_type_of_its_ids(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, RUN) as writer:
        book(writer, 1)
        writer.flush()
        with pytest.raises(LedgerError, match="cannot cut to step -1"):
            writer.cut(-1)
        writer.cut(0)
        writer.book(1, [7], {"math": np.ones(1)}, [])
    assert rows_in(tmp_path) == [(1, 7, "math", 1.0)]


def test_each_rank_keeps_to_its_own_parts(tmp_path: Path) -> None:
    def open_ranks(ranks: int, resume: bool) -> list[LedgerWriter]:
        return [LedgerWriter(tmp_path, RUN, rank=rank, ranks=ranks, resume=resume) for rank in range(ranks)]

    for rank, writer in enumerate(open_ranks(3, resume=False)):
        for step in (1, 2, 3):
            writer.book(step, [rank], {"math": np.ones(1)}, [])
        writer.close()
    for name in (".000000004-000000009-r0.parquet.r0.tmp", ".000000004-000000009-r1.parquet.r1.tmp"):
        (tmp_path / "values" / name).write_bytes(b"half")
    first, second = open_ranks(2, resume=True)
    assert not list((tmp_path / "values").glob(".*"))
    second.cut(2)
    uses = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 2)]
    assert sorted(row[:2] for row in rows_in(tmp_path)) == uses
    # The run has two ranks now: what the third booked is cut by the first.
    first.cut(1)
    assert sorted(row[:2] for row in rows_in(tmp_path)) == [(1, 0), (1, 1), (1, 2), (2, 1)]


def test_a_rank_leaves_the_temporary_files_of_others(tmp_path: Path) -> None:
    LedgerWriter(tmp_path, RUN, ranks=2).close()
    other = tmp_path / "values" / ".000000004-000000009-r1.parquet.r1.tmp"
    other.write_bytes(b"being written")
    LedgerWriter(tmp_path, RUN, ranks=2, resume=True).close()
    assert other.exists()
    assert rows_in(tmp_path) == []


def test_a_rank_says_how_many_there_are(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="rank 1 of 1 writers"):
        LedgerWriter(tmp_path, RUN, rank=1)
    with pytest.raises(LedgerError, match="part_rows is 0"):
        LedgerWriter(tmp_path, RUN, part_rows=0)
    LedgerWriter(tmp_path, RUN, rank=1, ranks=2).book(1, [1], {"math": np.ones(1)}, [])
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pl.DataFrame({"id": ["a", "b", "b", "a"]}), "the id 'a' 2 times"),
        (pl.DataFrame({"id": [1, None]}), "a null id"),
        (pl.DataFrame({"name": ["a"]}), 'no column "id"; their columns are: name'),
        (pl.DataFrame({"id": [1.5]}), "Float64; make them ints or strings"),
        (pl.DataFrame({"id": [2**64 - 1]}, schema={"id": pl.UInt64}), "could not be written"),
        (pl.DataFrame({"id": ["a"]}).lazy().select("id", pl.col("gone")), "could not be written.*gone"),
    ],
)
def test_examples_that_are_wrong_leave_the_earlier_table(
    tmp_path: Path, frame: pl.DataFrame | pl.LazyFrame, message: str
) -> None:
    write_examples(tmp_path, pl.DataFrame({"id": ["a"], "domain": ["x"]}))
    with pytest.raises(LedgerError, match=message):
        write_examples(tmp_path, frame)
    assert pl.read_parquet(tmp_path / "examples.parquet").rows() == [("a", "x")]
    assert [path.name for path in tmp_path.iterdir()] == ["examples.parquet"]


@pytest.mark.parametrize("ids", [["b", "a", "d", "c", "b"], ["c", "b", "a", None], ["a", "b", "b"], [None, "a"]])
def test_ids_are_counted_some_at_a_time(tmp_path: Path, ids: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_table, "_AT_ONCE", 1)
    with pytest.raises(LedgerError, match="a null id" if None in ids else "the id 'b' 2 times"):
        write_examples(tmp_path, pl.DataFrame({"id": ids}))
    write_examples(tmp_path, pl.DataFrame({"id": [*{*ids} - {None}]}))


def test_examples_can_be_made_from_the_table_itself(tmp_path: Path) -> None:
    LedgerWriter(tmp_path, RUN).close()
    write_examples(tmp_path, pl.DataFrame({"id": [2, 1]}, schema={"id": pl.UInt8}))
    examples = Ledger(tmp_path).examples()
    assert examples is not None
    write_examples(tmp_path, examples.with_columns(length=pl.col("id") * 10))
    stored = pl.read_parquet(tmp_path / "examples.parquet")
    assert stored.schema["id"] == pl.Int64
    assert stored.rows() == [(2, 20), (1, 10)]
