"""The reader: its aggregates against plain Python, its errors, and the memory it takes."""

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from inrun.ledger import Ledger, LedgerError, LedgerWriter, write_examples
from inrun.ledger.schema import STEPS_SCHEMA

TARGETS = ("math", "code")
Row = tuple[int, int, str, float]


def domain_of(identity: int) -> str | None:
    """The made-up examples' group; ids from 25 on are not in their table."""
    return ("news", "prose", "verse")[identity % 3] if identity < 25 else None


def text_of(identity: int) -> str | None:
    return f"text <b>{identity}</b>" if identity < 25 else None


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[Row]]:
    """A ledger of several parts, in a folder whose name is a pattern, and its rows."""
    folder, made, rows = tmp_path / "run[1]*lr=0.1", random.Random(3), []
    with LedgerWriter(folder, {"targets": list(TARGETS)}, part_rows=50) as writer:
        for step in range(1, 41):
            ids = [made.randrange(30) for _ in range(4)]
            values = {target: np.array([made.gauss(0, 1) for _ in ids]) for target in TARGETS}
            writer.book(step, ids, values, [{"target": name, "loss": 3 - step / 40} for name in reversed(TARGETS)])
            rows += [
                (step, identity, target, float(value))
                for target in TARGETS
                for identity, value in zip(ids, values[target], strict=True)
            ]
    write_examples(
        folder,
        pl.DataFrame(
            [(identity, domain_of(identity), text_of(identity), -identity) for identity in range(25)],
            schema=["id", "domain", "text", "count"],
            orient="row",
        ),
    )
    return folder, rows


def test_values_add_up_per_example(run: tuple[Path, list[Row]]) -> None:
    folder, rows = run
    totals: dict[tuple[int, str], list[float]] = defaultdict(list)
    for _, identity, target, value in rows:
        totals[identity, target].append(value)
    ledger = Ledger(folder)
    both = ledger.values()
    assert both.columns == ["id", "target", "value", "count"]
    assert both["value"].is_sorted(descending=True)
    assert {
        (identity, target): (pytest.approx(sum(found)), len(found)) for (identity, target), found in totals.items()
    } == {(identity, target): (value, count) for identity, target, value, count in both.rows()}
    one = ledger.values("code")
    assert one.columns == ["id", "value", "count"]
    expected = both.filter(target="code").drop("target")
    assert one.select("id", "count").equals(expected.select("id", "count"))
    assert one["value"].to_list() == pytest.approx(expected["value"].to_list())


def test_equal_values_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, {}) as writer:
        writer.book(1, ["c", "a", "d", "b"], {"math": np.array([0.0, 0.0, 1.0, 0.0])}, [])
    ledger = Ledger(tmp_path)
    assert ledger.values("math")["id"].to_list() == ["d", "a", "b", "c"]
    assert ledger.top(3)["id"].to_list() == ["d", "a", "b"]
    assert ledger.bottom(2)["id"].to_list() == ["a", "b"]


def test_top_and_bottom_show_the_examples(run: tuple[Path, list[Row]]) -> None:
    ledger = Ledger(run[0])
    best = ledger.top(5, "math")
    assert best.columns == ["id", "value", "count", "domain", "text", "example_count"]
    assert best.select("id", "count").equals(ledger.values("math").head(5).select("id", "count"))
    for identity, _, _, domain, text, example_count in ledger.top(100, "math").iter_rows():
        assert (domain, text) == (domain_of(identity), text_of(identity))
        assert example_count == (-identity if identity < 25 else None)
    worst = ledger.bottom(5, "math")
    assert worst["id"].to_list() == ledger.values("math")["id"].to_list()[:-6:-1]


def test_no_target_sums_over_all_and_counts_each_use_once(run: tuple[Path, list[Row]]) -> None:
    folder, rows = run
    found = {row["id"]: (row["value"], row["count"]) for row in Ledger(folder).top(100).iter_rows(named=True)}
    for identity in {row[1] for row in rows}:
        mine = [row for row in rows if row[1] == identity]
        uses = sum(row[2] == "math" for row in mine)
        assert found[identity] == (pytest.approx(sum(row[3] for row in mine)), uses)


@pytest.mark.parametrize("target", [None, "math"])
def test_groups_add_up_to_the_run(run: tuple[Path, list[Row]], target: str | None) -> None:
    folder, rows = run
    found = Ledger(folder).by("domain", target)
    keys = ["domain", "target"] if target is None else ["domain"]
    assert found.columns == [*keys, "value", "count", "examples", "mean", "negative"]
    assert found["value"].is_sorted(descending=True)
    assert found.height == (8 if target is None else 4)
    for row in found.iter_rows(named=True):
        of = row.get("target", target)
        mine = [one for one in rows if domain_of(one[1]) == row["domain"] and one[2] == of]
        totals: dict[int, float] = defaultdict(float)
        for _, identity, _, value in mine:
            totals[identity] += value
        assert row["value"] == pytest.approx(sum(totals.values()))
        assert row["count"] == len(mine)
        assert row["examples"] == len(totals)
        assert row["mean"] == pytest.approx(sum(totals.values()) / len(mine))
        assert row["negative"] == pytest.approx(sum(value < 0 for value in totals.values()) / len(totals))


@pytest.mark.parametrize("bins", [1, 7, 40, 1000])
def test_timeline_cuts_the_run_into_spans(run: tuple[Path, list[Row]], bins: int) -> None:
    folder, rows = run
    found = Ledger(folder).timeline("domain", bins)
    assert found.columns == ["domain", "target", "bin", "first_step", "last_step", "value", "count"]
    spans = found.select("bin", "first_step", "last_step").unique().sort("bin").rows()
    assert [number for number, _, _ in spans] == list(range(min(bins, 40)))
    assert [first for _, first, _ in spans] == [1, *(last + 1 for _, _, last in spans[:-1])]
    assert spans[-1][2] == 40
    lengths = [last - first + 1 for _, first, last in spans]
    assert max(lengths) - min(lengths) <= 1
    for domain, target, _, first, last, value, count in found.iter_rows():
        mine = [row[3] for row in rows if first <= row[0] <= last and domain_of(row[1]) == domain and row[2] == target]
        assert (value, count) == (pytest.approx(sum(mine)), len(mine))
    assert found["count"].sum() == len(rows)
    one = Ledger(folder).timeline("domain", bins, "code")
    assert one.drop("value").equals(found.filter(target="code").drop("value"))


def test_distribution_counts_every_example_once(run: tuple[Path, list[Row]]) -> None:
    ledger = Ledger(run[0])
    found, totals = ledger.distribution("math", 7), ledger.values("math")["value"]
    assert found.columns == ["left", "right", "count"]
    assert found["count"].to_list() == np.histogram(totals, 7)[0].tolist()
    assert (found["left"][0], found["right"][6]) == pytest.approx((totals.min(), totals.max()))


def test_distribution_of_equal_values_is_one_bar(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, {}) as writer:
        writer.book(1, [1, 2], {"math": np.array([0.25, 0.25])}, [])
    assert Ledger(tmp_path).distribution("math").rows() == [(0.25, 0.25, 2)]


def test_steps_are_in_order(run: tuple[Path, list[Row]]) -> None:
    ledger = Ledger(run[0])
    keys = ledger.steps().select("step", "target").rows()
    assert keys == [(step, target) for step in range(1, 41) for target in ("code", "math")]
    assert ledger.steps("math")["loss"].to_list() == [3 - step / 40 for step in range(1, 41)]


LATER = ["target_gradients", "game_error", "game_rmse", "game_spearman", "game_noise", "adjoint", "hessian_error"]


def make_old(folder: Path) -> None:
    """The parts of steps/ as they were written before these columns were there."""
    for path in (folder / "steps").iterdir():
        pl.read_parquet(path, glob=False).drop(LATER).write_parquet(path)


def test_steps_written_before_a_column_was_there_have_null_in_it(run: tuple[Path, list[Row]]) -> None:
    folder, _ = run
    before = Ledger(folder).steps()
    make_old(folder)
    assert Ledger(folder).steps().equals(before)
    assert Ledger(folder).targets == list(TARGETS)
    assert before.schema == STEPS_SCHEMA


@pytest.mark.parametrize("cut", [40, 17])
def test_a_ledger_begun_without_a_column_is_resumed_with_it(run: tuple[Path, list[Row]], cut: int) -> None:
    """Parts with and without it stand side by side, one of them cut in its middle."""
    folder, _ = run
    make_old(folder)
    with LedgerWriter(folder, {"targets": list(TARGETS)}, resume=True) as writer:
        writer.cut(cut)
        row = {"target": "math", "loss": 1.5, "target_gradients": 3, "game_error": 0.25, "game_spearman": -1}
        writer.book(cut + 1, [1], {"math": np.ones(1)}, [row])
    steps = Ledger(folder).steps("math")
    assert steps.schema == STEPS_SCHEMA
    assert steps["step"].to_list() == list(range(1, cut + 2))
    assert steps["loss"].to_list() == [*(3 - step / 40 for step in range(1, cut + 1)), 1.5]
    assert steps["game_error"].to_list() == [None] * cut + [0.25]
    assert steps.select(LATER).row(-1) == (3, 0.25, None, -1.0, None, None, None)


def test_targets_are_those_declared_then_those_booked(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, {"targets": {"z": "z.jsonl", "a": "a.jsonl"}}) as writer:
        assert Ledger(tmp_path).targets == ["z", "a"]
        writer.book(1, [1], {"m": np.ones(1)}, [{"target": "m"}, {"target": "b"}])
    assert Ledger(tmp_path).targets == ["z", "a", "b", "m"]


def test_a_ledger_can_be_read_before_and_while_it_is_written(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, {"targets": ["math"]})
    write_examples(tmp_path, pl.DataFrame({"id": ["a", "b"], "domain": ["x", "y"]}))
    ledger = Ledger(tmp_path)
    assert ledger.scan().collect().schema["id"] == pl.String
    for empty in (
        ledger.values(),
        ledger.steps(),
        ledger.top(),
        ledger.bottom(3, "math"),
        ledger.by("domain"),
        ledger.timeline("domain"),
        ledger.distribution("math"),
    ):
        assert empty.height == 0
    for step in (1, 2):
        writer.book(step, ["a", "c"], {"math": np.array([1.0, 2.0])}, [{"target": "math"}])
        writer.flush()
        (tmp_path / "values" / ".000000009-000000009-r0.parquet.r0.tmp").write_bytes(b"PAR1 half")
        assert ledger.values("math").rows() == [("c", 2.0 * step, step), ("a", 1.0 * step, step)]
        assert ledger.by("domain", "math")["domain"].to_list() == [None, "x"]
    writer.cut(1)
    assert ledger.values("math").rows() == [("c", 2.0, 1), ("a", 1.0, 1)]


def test_unknown_names_are_answered_with_the_known_ones(run: tuple[Path, list[Row]]) -> None:
    ledger = Ledger(run[0])
    for call in (ledger.values, ledger.steps, lambda name: ledger.top(3, name), ledger.distribution):
        with pytest.raises(LedgerError, match="no target 'maths'; the targets are: math, code"):
            call("maths")
    for group in (ledger.by, ledger.timeline):
        for name in ("source", "id", "count"):
            with pytest.raises(LedgerError, match=f"no column '{name}'.*: domain, text, example_count"):
                group(name)
    with pytest.raises(LedgerError, match="n is 0; give 1 or more"):
        ledger.top(0)
    with pytest.raises(LedgerError, match="bins is 0; give 1 or more"):
        ledger.timeline("domain", 0)


def test_examples_are_needed_to_group_and_only_there(run: tuple[Path, list[Row]]) -> None:
    folder, _ = run
    (folder / "examples.parquet").unlink()
    ledger = Ledger(folder)
    assert ledger.examples() is None
    assert ledger.top(2).columns == ["id", "value", "count"]
    with pytest.raises(LedgerError, match=r"'domain' without an examples table.*inrun\.write_examples"):
        ledger.by("domain")


def test_ids_of_two_types_are_not_joined(run: tuple[Path, list[Row]]) -> None:
    folder, _ = run
    write_examples(folder, pl.DataFrame({"id": ["1"], "domain": ["x"]}))
    with pytest.raises(LedgerError, match=r"examples\.parquet: its ids are String, but the run booked Int64"):
        Ledger(folder).by("domain")
    writer = LedgerWriter(folder / "other", {}, ranks=2)
    with LedgerWriter(folder / "other", {}, rank=1, ranks=2) as second, writer:
        writer.book(1, [1], {"math": np.ones(1)}, [])
        second.book(1, ["1"], {"math": np.ones(1)}, [])
    with pytest.raises(LedgerError, match=r"-r1\.parquet has ids of another type"):
        Ledger(folder / "other").values()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no ledger: there is no run\.json"),
        ("{", "not valid JSON"),
        ("[1]", "format None; this version of inrun reads format 1"),
        (json.dumps({"format": 2}), "format 2"),
    ],
)
def test_a_folder_that_is_no_ledger(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(LedgerError, match=message):
        Ledger(tmp_path)


@pytest.mark.parametrize("kind", ["values", "steps", "examples"])
@pytest.mark.parametrize("damage", ["cut short", "overwritten", "empty"])
def test_a_corrupt_file_is_named(run: tuple[Path, list[Row]], kind: str, damage: str) -> None:
    folder, _ = run
    path = folder / "examples.parquet" if kind == "examples" else sorted((folder / kind).iterdir())[2]
    content = path.read_bytes()
    middle = len(content) // 4
    path.write_bytes(
        {
            "cut short": content[:-9],
            "overwritten": content[:4] + b"\xff" * middle + content[4 + middle :],
            "empty": b"",
        }[damage]
    )
    ledger = Ledger(folder)
    with pytest.raises(LedgerError, match=path.name):
        ledger.steps() if kind == "steps" else ledger.by("domain")


def test_a_foreign_part_is_named(run: tuple[Path, list[Row]]) -> None:
    folder, _ = run
    pl.DataFrame({"step": [1]}).write_parquet(folder / "values" / "000000090-000000091-r0.parquet")
    with pytest.raises(LedgerError, match=r"000000090-000000091-r0\.parquet is no part of a ledger"):
        Ledger(folder).values()


MEASURE = """
import resource, sys
from inrun.ledger import Ledger
def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ledger = Ledger(sys.argv[1])
before = peak()
ledger.values("math"), ledger.top(), ledger.by("domain"), ledger.timeline("domain"), ledger.distribution("math")
print(peak() - before)
"""


def test_reading_takes_less_memory_than_the_rows(tmp_path: Path) -> None:
    steps, batch, distinct = 300, 20_000, 5_000
    made = np.random.default_rng(0)
    values = {target: made.standard_normal(batch) for target in TARGETS}
    with LedgerWriter(tmp_path, {}) as writer:
        for step in range(1, steps + 1):
            ids = made.integers(distinct, size=batch)
            writer.book(step, ids, values, [{"target": target} for target in TARGETS])
    write_examples(tmp_path, pl.DataFrame({"id": range(distinct)}).with_columns(domain=pl.col("id") % 7))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env={**os.environ, "POLARS_MAX_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    # Step, id and value take 24 bytes a row, the target 16.
    assert int(done.stdout) < steps * batch * len(TARGETS) * 40 / 3
