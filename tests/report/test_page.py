"""The page about a run: whole, self-contained, escaped, and its numbers those of the ledger."""

import base64
import hashlib
import html
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from inrun.ledger import Ledger, LedgerError, LedgerWriter, write_examples
from inrun.report import ReportError, figures, group_columns, one_line, page, printable, write_report

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e [bold]"
TARGETS = ["math", "code & <b>co</b>"]
RUN = {
    "identity": {"scheme": "path", "nodes": 1, "optimizer": "AdamW"},
    "targets": TARGETS,
    "versions": {"torch": "2.13.0"},
    "note": EVIL,
}
SOURCES = ["math", "prose", EVIL]


def write_ledger(
    folder: Path, *, steps: int = 60, targets: list[str] = TARGETS, audit: int = 10, skip: int | None = 7
) -> Path:
    """A ledger of `steps` steps of four uses of 24 examples; every `audit`-th step audited, step `skip` skipped."""
    generator = np.random.default_rng(0)
    with LedgerWriter(folder, {**RUN, "targets": targets}) as writer:
        for step in range(1, steps + 1):
            used = generator.integers(0, 24, 4)
            values = {name: generator.normal(0.01, 0.02, 4) for name in targets}
            rows: list[dict[str, Any]] = []
            for name in targets:
                total = float(values[name].sum())
                row = {
                    "target": name,
                    "loss": 5.0 / step,
                    "train_loss": 6.0 / step,
                    "value": total,
                    "conservation": 1e-9,
                    "target_gradients": 3 if step % 2 and name == targets[0] else 1,
                }
                if step == skip:
                    row |= {"loss": float("nan"), "value": None, "skipped": True, "conservation": None}
                    row |= {"target_gradients": None}
                elif audit and step % audit == 0:
                    row |= {"loss_before": 2.0, "loss_after": 2.0 - total - 0.25, "momentum": 0.125}
                    row |= {"decay": 0.0625, "unexplained": 0.0625}
                rows.append(row)
            writer.book(step, [f"e{one}" for one in used], {} if step == skip else values, rows)
    return folder


def play_games(folder: Path, *errors: float | None) -> None:
    """A ledger whose every step's game was played for the first target, with these errors; noise from the third on."""
    with LedgerWriter(folder, {**RUN, "targets": TARGETS}) as writer:
        for step, error in enumerate(errors, start=1):
            spearman = None if step == 1 else 1.0 - step / 8
            row = {"target": "math", "game_error": error, "game_rmse": step / 1e4, "game_spearman": spearman}
            row |= {"game_noise": step / 1e5 if step > 2 else 0.0}
            writer.book(step, ["a"], {"math": np.ones(1)}, [row, {"target": TARGETS[1]}])


def add_examples(folder: Path) -> None:
    """23 of the 24 examples: the last is in no group."""
    ids = [f"e{i}" for i in range(23)]
    texts = [EVIL if i % 2 else f"plain text of {i}" for i in range(23)]
    frame = {"id": ids, "document": ids, "domain": [SOURCES[i % 3] for i in range(23)], "preview": texts}
    write_examples(folder, pl.DataFrame(frame))


class Page(HTMLParser):
    """The tags of a page, its visible text and its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: dict[str, Any] = {}
        self.scripts: list[str] = []
        self._inside: str | None = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.text += data
        elif self._inside.endswith("-data"):
            self.figures[self._inside.removesuffix("-data")] = json.loads(data)
        elif self._inside == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_ledger(tmp_path_factory.mktemp("ledger") / "my-run")
    add_examples(folder)
    return folder


@pytest.fixture(scope="module")
def shown(folder: Path) -> Page:
    return Page(write_report(folder))


def test_the_page_is_one_file_that_asks_nothing_of_the_network(folder: Path, shown: Page) -> None:
    assert (folder / "report.html").stat().st_size < 10_000_000
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".report")]
    for tag, attributes in shown.tags:
        assert tag not in ("iframe", "img", "object", "embed", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:"))
    policy = next(a["content"] for _, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    # a browser runs exactly the scripts whose hashes the policy lists
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in shown.scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


def test_only_the_pages_own_scripts_are_scripts(shown: Page) -> None:
    scripts = [attributes for tag, attributes in shown.tags if tag == "script"]
    assert [a for a in scripts if a.get("type") != "application/json"] == [{}, {}]
    assert len(scripts) - 2 == len(shown.figures)
    assert html.escape(EVIL.split("\x1b")[0]) in shown.source
    assert "\x1b" not in shown.source
    assert "\u202e" not in shown.source


def test_the_head_says_what_ran_and_how_to_read_it(shown: Page) -> None:
    for words in ("my-run", "nats of a target's loss", "Positive helped", "scheme path", "optimizer AdamW", "2.13.0"):
        assert words.replace(" ", "") in shown.text.replace(" ", "")
    assert "stepsbooked60" in shown.text.replace(" ", "")


def test_the_heat_map_shows_the_ledgers_totals(folder: Path, shown: Page) -> None:
    by = Ledger(folder).by("domain")
    trace = shown.figures["heat-plot"]["data"][0]
    assert sorted(z for row in trace["z"] for z in row) == pytest.approx(sorted(by["value"]))
    assert trace["zmin"] == -trace["zmax"]
    axis = shown.figures["heat-plot"]["layout"]["yaxis"]
    assert axis["ticktext"][0] == "math"  # named like a target, so first
    assert "(none)" in axis["ticktext"]
    assert not any("<" in text for text in axis["ticktext"])


def test_the_distribution_counts_every_example_and_states_the_share_below_zero(folder: Path, shown: Page) -> None:
    values = Ledger(folder).values("math")
    assert sum(shown.figures["spread-1"]["data"][0]["y"]) == values.height
    below = int((values["value"] < 0).sum())
    assert f"below zero ({below} of {values.height} examples)" in shown.text


def test_the_running_totals_end_at_the_groups_totals(folder: Path, shown: Page) -> None:
    by = Ledger(folder).by("domain", "math")
    ends = {
        trace["name"]: trace["y"][-1]
        for trace in shown.figures["time-plot"]["data"]
        if trace["meta"] == {"target": "math", "view": "total"}
    }
    assert ends == pytest.approx({figures.label(name): value for name, value in by.select("domain", "value").rows()})


def test_the_best_and_worst_examples_are_those_of_the_ledger(folder: Path, shown: Page) -> None:
    ledger = Ledger(folder)
    section = shown.text.split("Best and worst examples")[1].split("The books")[0]
    ids = re.findall(r"id (e\d+)", section)
    expected: list[str] = []
    for target in (*TARGETS, None):
        expected += [*ledger.top(10, target)["id"], *ledger.bottom(10, target)["id"]]
    assert ids == expected
    assert EVIL.split("\x1b")[0] in section


def test_the_books_add_up_over_the_audited_steps(folder: Path) -> None:
    steps = Ledger(folder).steps()
    books = page.books(steps)
    for row in books["rows"]:
        assert row["audited"] == 6
        assert row["drop"] == pytest.approx(row["value"] + 0.25 * 6)
        assert row["drop"] == pytest.approx(row["value"] + row["momentum"] + row["decay"] + row["unexplained"])
        assert row["unexplained_share"] == pytest.approx(0.0625 * 6 / row["drop"])
    assert books["skipped"] == [7]
    assert books["conservation"]["conservation"] == 1e-9


def test_the_games_are_summed_up_by_target(tmp_path: Path) -> None:
    play_games(tmp_path, 2.0, 0.5, 0.25, 0.0, float("nan"))
    games = page.books(Ledger(tmp_path).steps())["games"]
    assert games == [
        {
            "target": "math",
            "games": 4,
            "in_full": 2,
            "error": pytest.approx(0.375),
            "rmse": pytest.approx(2.5e-4),
            "spearman": pytest.approx(5 / 8),
            "noise": pytest.approx(4e-5),
        }
    ]
    shown = Page(write_report(tmp_path))
    assert "Against the real game of a step" in shown.text
    assert re.search(r"math ?4 ?2 ?0\.38 ?0\.00025 ?0\.625 ?4e-05", shown.text)
    (trace,) = shown.figures["error-plot"]["data"]
    assert trace["name"] == "math"
    assert trace["x"] == [1, 2, 3]  # no zero on a logarithmic scale
    assert trace["y"] == [2.0, 0.5, 0.25]
    assert shown.figures["error-plot"]["layout"]["yaxis"]["type"] == "log"


def test_games_without_error_or_order_are_shown_too(tmp_path: Path) -> None:
    play_games(tmp_path, 0.0)
    shown = Page(write_report(tmp_path))
    assert re.search(r"math ?1 ?1 ?0 ?0\.0001 ?\u2013 ?0", shown.text)
    assert "error-plot" not in shown.figures


def test_the_target_gradients_of_a_step_are_told(folder: Path, shown: Page) -> None:
    steps = Ledger(folder).steps("math")
    mean = steps["target_gradients"].sum() / 59  # of 60 steps, one was skipped
    assert f"took, on average, 1 for code & <b>co</b>, {mean:.3g} for math." in shown.text
    assert "real game" not in shown.text  # none was played


def test_a_ledger_without_the_columns_of_today_has_a_page(tmp_path: Path) -> None:
    write_ledger(tmp_path, steps=3)
    for path in (tmp_path / "steps").iterdir():
        later = [name for name in pl.read_parquet(path).columns if name.startswith(("game_", "target_"))]
        pl.read_parquet(path).drop(later).write_parquet(path)
    shown = Page(write_report(tmp_path))
    assert "real game" not in shown.text
    assert "Target gradients" not in shown.text


def test_a_poor_run_leaves_out_what_it_has_not_and_says_why(tmp_path: Path) -> None:
    shown = Page(write_report(write_ledger(tmp_path, steps=1, targets=["only"], audit=0, skip=None)))
    assert "the run has no examples table" in shown.text
    assert "No step was audited" in shown.text
    assert "no step was skipped" in shown.text
    assert {"loss-plot", "spread-1"} == set(shown.figures)


def test_a_run_without_a_step_is_a_page_too(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, {"targets": ["math"]}):
        pass
    shown = Page(write_report(tmp_path))
    assert shown.figures == {}
    assert "No value was booked" in shown.text


def test_examples_without_a_column_to_group_by_say_so(tmp_path: Path) -> None:
    write_ledger(tmp_path, steps=3)
    write_examples(tmp_path, pl.DataFrame({"id": [f"e{i}" for i in range(60)], "name": [f"n{i}" for i in range(60)]}))
    shown = Page(write_report(tmp_path))
    assert "no column named “domain” or “source”" in shown.text
    assert "heat-plot" not in shown.figures
    shown = Page(write_report(tmp_path, group="name"))
    assert "heat-plot" in shown.figures


def test_group_columns_prefer_domain_then_source_then_few_valued_text(tmp_path: Path) -> None:
    write_ledger(tmp_path, steps=3)
    n = 60
    frame = {
        "id": [f"e{i}" for i in range(n)],
        "document": [f"d{i}" for i in range(n)],
        "tokens": list(range(n)),
        "language": ["en", "de"] * 30,
        "source": [f"s{i}" for i in range(n)],
        "text": ["t"] * n,
    }
    write_examples(tmp_path, pl.DataFrame(frame))
    assert group_columns(Ledger(tmp_path)) == ["source", "language"]


def test_errors_name_the_column_the_folder_and_the_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="colour"):
        write_report(folder, group="colour")
    with pytest.raises(LedgerError, match=r"run\.json"):
        write_report(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(ReportError, match="taken"):
        write_report(folder, taken)
    assert list(taken.iterdir()) == []
    assert list(tmp_path.iterdir()) == [taken]


def test_a_report_goes_where_it_is_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert write_report(folder, out) == out
    assert list(out.parent.iterdir()) == [out]


def test_long_curves_are_means_of_equal_runs_of_steps() -> None:
    curve = pl.DataFrame({"step": range(1, 2001), "y": [float(i) for i in range(2000)]})
    points, window = figures.thin(curve, most=600)
    assert window == 4
    assert points.height == 500
    assert points["y"].mean() == pytest.approx(curve["y"].mean())
    assert points["y"][0] == pytest.approx(1.5)
    gaps = pl.DataFrame({"step": [1, 2, 3], "y": [1.0, float("nan"), None]})
    assert figures.thin(gaps)[0]["step"].to_list() == [1]


def test_many_groups_end_in_one_row_that_keeps_the_totals() -> None:
    names = [f"g{i:03d}" for i in range(100)]
    by = pl.DataFrame(
        {"kind": names, "target": ["t"] * 100, "value": [1.0 / (i + 1) for i in range(100)], "count": [2] * 100}
    ).with_columns(examples=pl.lit(1))
    rows = figures.heat_rows(by, "kind", ["t"])
    assert rows.height == 40
    assert rows["group"][-1] == "61 smaller groups"
    assert rows["value:t"].sum() == pytest.approx(by["value"].sum())
    assert rows["uses"].sum() == 200


@pytest.mark.parametrize(
    ("text", "line"), [("a\nb\t c", "a b c"), ("x" * 300, "x" * 199 + "…"), ("\x1b[2J\u202eok", "[2J ok")]
)
def test_text_is_shown_on_one_line_without_control_characters(text: str, line: str) -> None:
    assert one_line(text) == line
    assert printable("a\nb\x00") == "a\nb "


def test_a_page_never_takes_the_place_of_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReportError, match=r"pipe: it is there and not a plain file"):
        write_report(write_ledger(tmp_path / "run"), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_tokens_are_shaded_by_their_values(tmp_path: Path) -> None:
    """For each target by its own values; the text escaped; plain text where tokens, values or their counts lack."""
    with LedgerWriter(tmp_path, {**RUN, "targets": ["math", "code"]}) as writer:
        writer.book(
            1,
            ["a", "b", "c"],
            {"math": np.array([3.0, -1.0, 0.5]), "code": np.array([-3.0, 1.0, 0.5])},
            [{"target": "math"}, {"target": "code"}],
            {},
            {
                "math": [np.array([4.0, -1.0, 0.0]), np.array([-1.0]), np.array([0.25, 0.25])],
                "code": [np.array([-4.0, 1.0, 0.0]), np.array([1.0]), np.array([0.25, 0.25])],
            },
        )
    frame = {"id": ["a", "b", "c"], "text": ["whole a", "whole b", "whole c"]}
    texts = [["x ", EVIL, None], ["of", "two"], None]
    write_examples(tmp_path, pl.DataFrame(frame | {"token_texts": pl.Series(texts, dtype=pl.List(pl.String))}))
    shown = Page(write_report(tmp_path))
    tokens = [a for tag, a in shown.tags if tag == "span" and (a.get("class") or "").startswith("token ")]
    for_math = [("token plus", "--share: 60%", "+4.00 nats"), ("token minus", "--share: 15%", "-1.00 nats")]
    for_code = [("token minus", "--share: 60%", "-4.00 nats"), ("token plus", "--share: 15%", "+1.00 nats")]
    nothing = ("token plus", "--share: 0%", "0 nats")
    assert [(a["class"], a["style"], a["title"]) for a in tokens] == [*for_math, nothing, *for_code, nothing]
    assert html.escape(EVIL.split("\x1b")[0]) in shown.source
    assert shown.text.count("whole b") == 2  # for each target
    assert shown.text.count("whole a") == shown.text.count("whole c") == 1  # for all together
    assert "shaded by theirs" in shown.text


def test_a_long_example_shows_its_first_tokens(tmp_path: Path) -> None:
    n = page.MOST_TOKENS + 5
    with LedgerWriter(tmp_path, {**RUN, "targets": ["math"]}) as writer:
        tokens = {"math": [np.linspace(-1, 2, n)]}
        writer.book(1, [3], {"math": np.array([1.0])}, [{"target": "math"}], {}, tokens)
    texts = pl.Series([[f"t{k} " for k in range(n)]])
    write_examples(tmp_path, pl.DataFrame({"id": [3], "token_texts": texts}))
    source = page.render(Ledger(tmp_path), "run")
    assert f">t{page.MOST_TOKENS - 1} </span>" in source
    assert f">t{page.MOST_TOKENS} </span>" not in source
    assert ">…</span>" in source
