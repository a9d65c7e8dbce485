"""The page of a run with values of several schemes: what it compares, and what a replay's own says."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from inrun import game
from inrun.ledger import LedgerWriter, write_examples
from inrun.report import figures, schemes, write_report
from tests.report.test_page import EVIL, RUN, Page


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four examples, the last of no group; the replay has another target, too, and turns the examples' order."""
    folder = tmp_path_factory.mktemp("replayed") / "run"
    told: dict[str, dict[str, Any]] = {
        ".": {**RUN, "scheme": "path", "targets": ["math"]},
        "schemes/replay": {"scheme": "replay", "horizon": None, "targets": {"math": {}, "later": {}}},
        "schemes/replay-h10": {"scheme": "replay", "horizon": 10, "targets": {"math": {}}},
    }
    values = {".": [4.0, 2.0, 1.0, -1.0], "schemes/replay-h10": [3.0, 2.0, 1.0, 1.0], "schemes/replay": [0, 1, 2, 3]}
    for place, run in told.items():
        with LedgerWriter(folder / place, run) as writer:
            booked = {name: np.array(values[place], dtype=float) for name in run["targets"]}
            rows = [{"target": name, "adjoint": None if place == "." else 8.0} for name in booked]
            rows[0] |= {"hessian_error": 0.5 if place != "." else None}
            writer.book(1, ["a", "b", "c", "d"], booked, rows)
    write_examples(folder, pl.DataFrame({"id": ["a", "b", "c"], "domain": ["x", "x", EVIL]}))
    return folder


def test_schemes_are_compared_by_group_and_by_order(replayed: Path) -> None:
    found = Page(write_report(replayed))
    figure = found.figures["horizon-plot"]
    lines = {(line["meta"]["target"], line["name"]): line["y"] for line in figure["data"]}
    assert lines == {
        ("math", "all examples"): [6.0, 7.0, 6.0],
        ("math", "x"): [6.0, 5.0, 1.0],
        ("math", figures.label(EVIL)): [1.0, 1.0, 2.0],
        ("math", "(none)"): [-1.0, 1.0, 3.0],
        ("later", "all examples"): [None, None, 6.0],
        ("later", "x"): [None, None, 1.0],
        ("later", figures.label(EVIL)): [None, None, 2.0],
        ("later", "(none)"): [None, None, 3.0],
    }
    assert [line["visible"] for line in figure["data"]] == [True] * 4 + [False] * 4
    assert figure["layout"]["xaxis"]["ticktext"] == ["in-run", "h10", "full<br>replay"]
    orders = found.source.split("in the same order?")[1].split("</section>")[0]
    cells = re.findall(r'<(?:td|th)[^>]*class="number">\s*([^<]*?)\s*<', orders)
    assert cells == ["in-run", "h10", "0.95", "-1.00", "-0.95", "in-run", "h10", *["\u2013"] * 3]  # none for "later"
    assert "scheme path (in-run)" in found.text
    assert "adjoint-plot" not in found.figures


def test_the_page_of_a_replay_says_what_it_shows(replayed: Path) -> None:
    path = write_report(replayed, scheme="replay")
    assert path == replayed / "report-replay.html"
    found = Page(path)
    assert "scheme replay" in found.text.split("How to read the numbers.")[0]
    assert "what it did to the target's loss at the end of the run, to first order" in found.text
    assert [(line["name"], line["y"]) for line in found.figures["adjoint-plot"]["data"]] == [
        ("math", [8.0]),
        ("later", [8.0]),
    ]
    assert "the largest relative error was 0.5, at step 1 for target math" in found.text
    assert "horizon-plot" in found.figures
    assert "audit_every" not in found.text


def test_rank_correlation_is_that_of_the_games_over_the_examples_of_both() -> None:
    """With ties, which both give the mean of their ranks; None where it is not defined."""
    made = np.random.default_rng(0)
    a, b = (pl.DataFrame({"id": range(n), "value": made.integers(0, 6, n).astype(float)}) for n in (40, 50))
    x, y = (torch.tensor(of["value"].to_list()[:40]) for of in (a, b))
    assert schemes.rank_correlation(a, b.sample(fraction=1, shuffle=True, seed=1)) == pytest.approx(game.spearman(x, y))
    assert schemes.rank_correlation(a, a) == 1.0
    assert schemes.rank_correlation(a, b.with_columns(value=0.0)) is None
    assert schemes.rank_correlation(a, b.tail(10)) is None


def test_many_groups_are_the_same_lines_for_every_target() -> None:
    groups: dict[str | None, list[float | None]] = {f"g{i}": [10.0 - i, 10.0 - i] for i in range(10)}
    first = schemes.Comparison("a", [55.0, 55.0], groups, [])
    second = schemes.Comparison("b", [None, 100.0], {"g9": [None, 100.0]}, [])
    one, two = figures.horizon_rows([first, second])
    assert [name for name, _ in one] == [name for name, _ in two]
    assert [name for name, _ in one[:3]] == ["all examples", "g9", "g0"]
    assert one[-1] == ("3 smaller groups", [9.0, 9.0])
    assert (two[1], two[-1]) == (("g9", [None, 100.0]), ("3 smaller groups", [None, 0.0]))
