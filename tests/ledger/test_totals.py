"""Totals that are kept: what is answered from them is what the parts say, whatever happens to either."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inrun.ledger import Ledger, LedgerError, LedgerWriter, ranked, reader, totals, write_examples
from inrun.ledger.schema import list_parts
from tests.ledger.rows import names

RUN = {"targets": ["math", "code"]}
Identity = Callable[[int], Any]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run per part, and files of few ids."""
    for name, value in {"_BATCH": 1, "_SPAN": 16, "_SAMPLED": 2, "_GROUP": 5}.items():
        monkeypatch.setattr(totals, name, value)


def book(writer: LedgerWriter, *steps: int, of: Identity = str, seed: int = 0) -> None:
    """Ids are used again, twice in a step even; some steps have one of the targets only, or a third."""
    for step in steps:
        made = random.Random(f"{seed}-{step}")
        ids = [of(made.randrange(-20, 40)) for _ in range(6)]
        ids[1] = ids[0]
        targets = ["math"] if step % 5 == 0 else ["math", "code", "news"] if step % 7 == 0 else ["math", "code"]
        writer.book(step, ids, {name: np.array([made.gauss(0, 1) for _ in ids]) for name in targets}, [])


def write(folder: Path, *steps: int, of: Identity = str, seed: int = 0, ranks: int = 1, cut: int | None = None) -> None:
    """Go on with a run, cut first if asked for, in parts of two or three steps, each rank with its own rows."""
    for rank in range(ranks):
        with LedgerWriter(folder, RUN, resume=True, rank=rank, ranks=ranks, part_rows=30) as writer:
            if cut is not None:
                writer.cut(cut)
            book(writer, *steps, of=of, seed=seed + rank)


def added_up(folder: Path) -> dict[tuple[Any, str], tuple[float, int]]:
    """The totals by plain Python."""
    uses: dict[tuple[Any, str], list[float]] = defaultdict(list)
    for part in list_parts(folder, "values"):
        for _, identity, target, value in pl.read_parquet(part.path, glob=False).iter_rows():
            uses[identity, target].append(value)
    return {key: (sum(values), len(values)) for key, values in uses.items()}


def assert_right(folder: Path) -> None:
    """Every query says what the parts do."""
    ledger, expected = Ledger(folder), added_up(folder)
    both = ledger.values()
    assert both["value"].is_sorted(descending=True)
    found = {(identity, target): (value, count) for identity, target, value, count in both.rows()}
    assert found.keys() == expected.keys()
    assert all(found[key] == (pytest.approx(value, rel=1e-12, abs=1e-12), n) for key, (value, n) in expected.items())
    for target in ("math", "code"):
        of = {identity: total for (identity, name), total in expected.items() if name == target}
        order = sorted(of, key=lambda identity: -of[identity][0])
        values = ledger.values(target)
        assert values["id"].to_list() == order
        assert values["value"].to_list() == pytest.approx([of[identity][0] for identity in order], rel=1e-12, abs=1e-12)
        assert values["count"].to_list() == [of[identity][1] for identity in order]
        assert ledger.top(5, target)["id"].to_list() == order[:5]
        assert ledger.bottom(5, target)["id"].to_list() == order[:-6:-1]
        assert ledger.distribution(target, 7)["count"].sum() == len(of)
    of_all: dict[Any, float] = defaultdict(float)
    for (identity, _), (value, _) in expected.items():
        of_all[identity] += value
    assert ledger.top(3)["id"].to_list() == sorted(of_all, key=lambda identity: -of_all[identity])[:3]


def assert_grouped(folder: Path, known: dict[Any, str]) -> None:
    expected = added_up(folder)
    for target in ("math", None):
        groups: dict[tuple[str | None, Any], list[tuple[float, int]]] = defaultdict(list)
        for (identity, name), total in expected.items():
            if target in (None, name):
                groups[known.get(identity), name].append(total)
        rows = Ledger(folder).by("kind", target)
        assert rows["value"].is_sorted(descending=True)
        assert rows.height == len(groups)
        for row in rows.iter_rows(named=True):
            mine = groups[row["kind"], row.get("target", target)]
            value, count = sum(value for value, _ in mine), sum(count for _, count in mine)
            assert (row["count"], row["examples"]) == (count, len(mine))
            assert (row["value"], row["mean"]) == (pytest.approx(value), pytest.approx(value / count))
            assert row["negative"] == pytest.approx(sum(value < 0 for value, _ in mine) / len(mine))


def covers(folder: Path) -> bool:
    """Whether there are totals of all parts."""
    found = totals.usable(folder)
    return found is not None and not totals.later_parts(folder, found)


@pytest.mark.parametrize("of", [str, int, lambda n: f"ü/{n}" * 9])
def test_totals_are_what_the_parts_say(tmp_path: Path, of: Identity) -> None:
    write(tmp_path, *range(1, 30), of=of)
    assert_right(tmp_path)
    Ledger(tmp_path).compact()
    assert covers(tmp_path)
    found = totals.usable(tmp_path)
    assert found is not None
    assert len(found.files) > 3
    assert_right(tmp_path)
    columns = pl.read_parquet(found.files, glob=False)
    assert columns["id"].is_sorted()
    assert columns["id"].is_unique().all()
    assert {"value:math", "count:math", "value:news", "count:news"} < set(columns.columns)
    written = sorted(path.name for path in (tmp_path / "totals").iterdir())
    Ledger(tmp_path).compact()  # there is nothing to do
    assert sorted(path.name for path in (tmp_path / "totals").iterdir()) == written == [
        *sorted([json.loads((tmp_path / "totals" / "totals.json").read_text())["folder"], "lock"]), "totals.json",
    ]  # fmt: skip


def test_parts_that_came_later_are_added(tmp_path: Path) -> None:
    """Of ids between, below and above those of the totals, and of a target that is new; and then go into them."""
    write(tmp_path, 1, 2, 3, 4, of=int)
    Ledger(tmp_path).compact()
    before = totals.usable(tmp_path)
    assert before is not None
    assert "news" not in before.targets
    write(tmp_path, *range(5, 12), of=int)
    write(tmp_path, 12, 13, of=lambda n: n + 1000)
    write(tmp_path, 14, 15, of=lambda n: n - 1000)
    assert totals.usable(tmp_path) == before
    assert not covers(tmp_path)
    assert_right(tmp_path)
    Ledger(tmp_path).compact()
    assert covers(tmp_path)
    assert_right(tmp_path)
    assert not before.files[0].exists()


def test_a_target_that_totals_do_not_have(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    Ledger(tmp_path).compact()
    with LedgerWriter(tmp_path, RUN, resume=True) as writer:
        writer.book(3, ["x"], {"art": np.ones(1)}, [{"target": "art"}, {"target": "none"}])
    assert Ledger(tmp_path).values("art").rows() == [("x", 1.0, 1)]
    assert Ledger(tmp_path).values("none").rows() == []
    assert Ledger(tmp_path).top(3, "none").rows() == []
    assert Ledger(tmp_path).distribution("none").rows() == []


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_totals_of_a_run_that_was_resumed_are_not_used(tmp_path: Path, ranks: int) -> None:
    """With any number of ranks, cut in the middle of a part and at its end, and booked again with other values."""
    write(tmp_path, *range(1, 13), ranks=2)
    Ledger(tmp_path).compact()
    write(tmp_path, *range(7, 13), ranks=ranks, cut=6, seed=50)
    assert totals.usable(tmp_path) is None
    assert_right(tmp_path)
    Ledger(tmp_path).compact()
    assert covers(tmp_path)
    assert_right(tmp_path)
    write(tmp_path, ranks=ranks, cut=12)  # which changes nothing
    assert covers(tmp_path)


def test_totals_made_while_their_parts_were_replaced_are_not_used(tmp_path: Path) -> None:
    """Parts of the same names, and as large: told by their time."""
    write(tmp_path, *range(1, 9), of=int)
    Ledger(tmp_path).compact()
    manifest = tmp_path / "totals" / "totals.json"
    before, stored = names(tmp_path, "values"), manifest.read_text()
    stamps = [totals.stamp(part) for part in list_parts(tmp_path, "values")]
    write(tmp_path, *range(1, 9), of=lambda n: n + 1, cut=0)
    assert names(tmp_path, "values") == before
    assert not manifest.exists()
    manifest.write_text(stored)  # as by who began before the cut and ended after it
    assert [size for size, _ in stamps] == [totals.stamp(part)[0] for part in list_parts(tmp_path, "values")]
    assert totals.usable(tmp_path) is None
    assert_right(tmp_path)


def test_a_part_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path, *range(1, 9))
    Ledger(tmp_path).compact()
    list_parts(tmp_path, "values")[1].path.unlink()
    assert totals.usable(tmp_path) is None
    assert_right(tmp_path)


KINDS = {
    "all, sorted": range(-20, 40),
    "more": range(-99, 99),
    "fewer": range(3, 30),
    "unsorted": [*range(39, -21, -1)],
}


@pytest.mark.parametrize("table", KINDS)
@pytest.mark.parametrize("of", [str, int])
def test_groups(tmp_path: Path, table: str, of: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MANY", 0)
    known = {of(n): "xyz"[n % 3] for n in KINDS[table]}
    write(tmp_path, *range(1, 20), of=of)
    frame = pl.DataFrame({"id": list(known), "kind": list(known.values())})
    write_examples(tmp_path, frame if table == "unsorted" else frame.sort("id"))
    assert_grouped(tmp_path, known)
    Ledger(tmp_path).compact()
    assert_grouped(tmp_path, known)
    write(tmp_path, 20, 21, of=of)
    assert_grouped(tmp_path, known)
    best = Ledger(tmp_path).top(4, "math")
    assert best["kind"].to_list() == [known.get(identity) for identity in best["id"]]


def test_ids_of_two_types(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, of=int)
    Ledger(tmp_path).compact()
    write_examples(tmp_path, pl.DataFrame({"id": ["1"], "kind": ["x"]}))
    with pytest.raises(LedgerError, match=r"its ids are String, but the run booked Int64"):
        Ledger(tmp_path).by("kind")


def test_a_large_ledger_is_added_up_by_its_first_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, *range(1, 9))
    Ledger(tmp_path).values("math")
    assert not (tmp_path / "totals").exists()
    monkeypatch.setattr(reader, "_WORTH_KEEPING", 100)
    with monkeypatch.context() as others:
        others.setattr(os, "access", lambda path, mode: False)
        assert_right(tmp_path)
        assert not (tmp_path / "totals").exists()
    assert_right(tmp_path)
    assert covers(tmp_path)
    told = capsys.readouterr().err
    assert told.count("adding up") == told.count("totals made in") == 1
    assert f"{tmp_path}: adding up" in told
    monkeypatch.setattr(reader, "_WORTH_KEEPING", 2**31)
    write(tmp_path, 9)
    assert_right(tmp_path)
    assert not capsys.readouterr().err


class Killed(BaseException):
    """Stands for the process that ends here."""


def mortal(call: Callable[..., Any], clock: Iterator[int]) -> Callable[..., Any]:
    def change(*given: Any) -> Any:
        if next(clock, 0) == 0:
            raise Killed
        return call(*given)

    return change


@pytest.mark.parametrize("later", [False, True])
def test_a_kill_at_any_point(tmp_path: Path, later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the totals that were there nor those half made are used for what they do not say."""
    write(tmp_path, *range(1, 5))
    if later:
        Ledger(tmp_path).compact()
    write(tmp_path, *range(5, 13))
    kills = 0
    for moment in range(1000):
        with monkeypatch.context() as patch:
            clock = iter(range(moment, -1, -1))
            for place, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (totals, "_write")):
                patch.setattr(place, name, mortal(getattr(place, name), clock))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # who is killed clears nothing away
            try:
                Ledger(tmp_path).compact()
                break
            except Killed:
                kills += 1
        if moment % 5 == 0:
            assert_right(tmp_path)
    assert kills > 20
    assert covers(tmp_path)
    assert_right(tmp_path)
    write(tmp_path, 13)
    Ledger(tmp_path).compact()
    assert len(list((tmp_path / "totals").iterdir())) == 3  # one folder, totals.json, the lock: no leftovers


CHILD = """
import sys
sys.path.insert(0, {root!r})
from inrun.ledger import Ledger, totals
totals._BATCH, totals._SPAN, totals._SAMPLED = 1, 16, 2
print("begun", flush=True)
Ledger({folder!r}).compact()
"""


def test_a_process_that_is_killed_and_another_that_waits_for_it(tmp_path: Path) -> None:
    write(tmp_path, *range(1, 200))
    code = CHILD.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    for delay in (0.02, 0.1, 0.3):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
        assert_right(tmp_path)
    threads = [threading.Thread(target=Ledger(tmp_path).compact) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert covers(tmp_path)
    assert_right(tmp_path)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *range(1, 9))

    def fail(self: pl.DataFrame, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(pl.DataFrame, "write_parquet", fail)
        with pytest.raises(LedgerError, match=r"run-000000\.parquet could not be written .*No space.*free space"):
            Ledger(tmp_path).compact()
    assert names(tmp_path, "totals") == ["lock"]
    assert_right(tmp_path)


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    write(tmp_path, *range(1, 9))
    part = list_parts(tmp_path, "values")[1].path
    content = part.read_bytes()
    part.write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    with pytest.raises(LedgerError, match=part.name):
        Ledger(tmp_path).compact()
    part.write_bytes(content)
    Ledger(tmp_path).compact()
    found = totals.usable(tmp_path)
    assert found is not None
    found.files[0].write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(LedgerError, match=r"000000\.parquet cannot be read.*remove .*totals, which is made anew"):
        Ledger(tmp_path).values("math")
    (tmp_path / "totals" / "totals.json").write_text("{")
    with pytest.raises(LedgerError, match=r"totals\.json is not valid JSON"):
        Ledger(tmp_path).values("math")


numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1 + 2**-52, 1e300, -1e300, 5e-324]), st.floats(-1e3, 1e3))


@given(st.lists(st.lists(numbers, max_size=30), max_size=5))
def test_ranked_is_sorted_by_value_then_id(values: list[list[float]]) -> None:
    whole = pl.DataFrame({"value": [one for frame in values for one in frame]}, schema={"value": pl.Float64})
    whole = whole.with_row_index("id")
    frames, first = [], 0
    for of in values:
        frames.append(whole.slice(first, len(of)))
        first += len(of)
    found = ranked.ranked([whole.head(0), *frames])
    expected = sorted(whole.rows(), key=lambda row: (-row[1], row[0]))
    assert found.select("id", "value").rows() == expected


def test_ranked_by_numbers_that_hardly_differ() -> None:
    made = np.random.default_rng(0)
    near: list[Any] = [1 + made.integers(0, 50, 5000) * 2.0**-52, np.full(5000, 0.25), made.standard_normal(5000)]
    for values in near:
        order = ranked._descending(values)
        assert order.tolist() == np.argsort(-values, kind="stable").tolist()
