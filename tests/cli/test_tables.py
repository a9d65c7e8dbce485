"""`inrun top` and `inrun by` on real ledgers, and `inrun` itself: its errors, its pipes, what it loads."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from inrun.cli.by import print_by
from inrun.cli.main import COMMANDS, main
from inrun.cli.top import print_top
from inrun.ledger import Ledger, LedgerWriter, write_examples

MARKUP = "[bold red]not markup[/] <script>\x1b[31m\x07 tail " + "and more words " * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two targets; a used twice, d without a row in the examples table. Totals: see the tests."""
    run = tmp_path / "run"
    with LedgerWriter(run, {"identity": {"scheme": "path"}, "targets": ["math", "code"]}) as writer:
        for step, ids, math, code in (
            (1, ["a", "b"], [0.5, -0.25], [-1.0, 0.125]),
            (2, ["a", "c", "d"], [0.25, 0.125, 0.0625], [-0.5, 2.0, 0.25]),
        ):
            values = {"math": np.array(math), "code": np.array(code)}
            rows = [{"target": name, "value": float(of.sum())} for name, of in values.items()]
            writer.book(step, ids, values, rows)
    frame = {"id": ["a", "b", "c"], "domain": ["math", "math", "code"], "preview": [MARKUP, None, "line\nbreak"]}
    write_examples(run, pl.DataFrame(frame))
    return run


def test_top_prints_rank_id_value_uses_group_and_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(folder), "--target", "math", "-n", "2"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "│" in line]
    assert [cell.strip() for cell in lines[0].split("│")[1:6]] == ["1", "a", "+0.7500", "2", "math"]
    assert [cell.strip() for cell in lines[1].split("│")[1:6]] == ["2", "c", "+0.1250", "1", "code"]
    assert "[bold red]not markup[/] <script>" in out
    assert "line break" in out
    assert "positive = helped" in out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert max(map(len, out.splitlines())) <= 120


def test_top_without_a_target_sums_them_and_counts_a_use_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["id"], row["value"], row["count"]) for row in rows] == [
        ("c", 2.125, 1),
        ("d", 0.3125, 1),
        ("b", -0.125, 1),
        ("a", -0.75, 2),
    ]
    assert rows[3]["preview"] == MARKUP
    assert rows[1]["domain"] is None


def test_worst_starts_with_the_worst(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(folder), "--worst", "--json", "-n", "1", "--target", "code"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ["a"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_fits_the_width_of_its_console(folder: Path, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    print_top(Ledger(folder), 3, console=console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "+2.1250" in text


def test_by_prints_totals_that_add_up_with_the_group_of_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["by", str(folder), "domain"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["math", "2", "3", "+0.5000*", "50%", "-1.3750", "50%"],
        ["code", "1", "1", "+0.1250", "0%", "+2.0000*", "0%"],
        ["(none)", "1", "1", "+0.0625", "0%", "+0.2500", "0%"],
    ]


def test_by_json_has_a_row_per_group_and_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["by", str(folder), "domain", "--target", "code", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["domain"], row["target"], row["value"]) for row in rows} == {
        ("math", "code", -1.375),
        ("code", "code", 2.0),
        (None, "code", 0.25),
    }


def test_a_scheme_is_shown_with_its_name_and_what_its_values_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, horizon, value in (("replay", None, 3.0), ("replay-h10", 10, 2.0)):
        run: dict[str, object] = {"scheme": "replay", "horizon": horizon, "targets": {"math": {}}}
        with LedgerWriter(folder / "schemes" / name, run) as writer:
            writer.book(1, ["a", "b"], {"math": np.array([-value, value])}, [{"target": "math"}])
    for command in (["top", str(folder)], ["by", str(folder), "domain"]):
        told = {}
        for scheme in ("path", "replay", "replay-h10"):
            assert main([*command, "--target", "math", "--scheme", scheme]) == 0
            told[scheme] = " ".join(capsys.readouterr().out.split())
        assert "; scheme path (in-run)" in told["path"]
        assert "nats of target loss over the run; positive" in told["path"]
        assert "; scheme replay " in told["replay"]
        assert "nats of the target's loss at the end of the run, to first order; positive" in told["replay"]
        assert "; scheme replay-h10" in told["replay-h10"]
        assert "10 steps after each use, on average (a geometric horizon), to first order" in told["replay-h10"]
    assert main(["top", str(folder), "--scheme", "replay", "--json", "-n", "1"]) == 0
    (best,) = json.loads(capsys.readouterr().out)
    assert (best["id"], best["value"], best["domain"]) == ("b", 3.0, "math")
    for options, page in (([], "report.html"), (["--scheme", "replay-h10"], "report-replay-h10.html")):
        assert main(["report", str(folder), *options]) == 0
        assert capsys.readouterr().out == f"{folder / page}\n"
        assert (folder / page).exists()


def test_targets_beyond_the_width_go_to_a_further_table(tmp_path: Path) -> None:
    targets = [f"target-{i}" for i in range(7)]
    with LedgerWriter(tmp_path, {"targets": targets}) as writer:
        values = {name: np.array([i + 0.5]) for i, name in enumerate(targets)}
        writer.book(1, [7], values, [{"target": name} for name in targets])
    write_examples(tmp_path, pl.DataFrame({"id": [7], "source": ["[red]x[/red]"]}))
    console = Console(width=90, record=True, file=io.StringIO())
    print_by(Ledger(tmp_path), "source", console=console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 90
    assert all(f"+{i}.5000" in text for i in range(7))
    assert text.count("[red]x[/red]") > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["top", "nowhere"], ["nowhere", "run.json"]),
        (["top", "RUN", "--target", "poetry"], ["poetry", "math, code"]),
        (["top", "RUN", "-n", "0"], ["0"]),
        (["by", "RUN", "colour"], ["colour", "domain"]),
        (["report", "RUN", "--group", "colour"], ["colour", "domain"]),
        (["top", "RUN", "--scheme", "replay"], ["no scheme 'replay'", "path (in-run)", "inrun replay"]),
    ],
)
def test_what_a_user_can_mend_is_one_paragraph_and_status_1(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main([str(folder) if word == "RUN" else word for word in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"inrun {arguments[0]}: ")
    assert all(word in err for word in words)


def test_help_lists_every_command_and_each_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and command.summary in out for name, command in COMMANDS.items())
    for name in ("report", "top", "by"):
        assert main([name, "--help"]) == 0
        assert f"Example: inrun {name} runs/demo" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_command_line_is_status_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tpo", str(folder)]) == 2
    assert "did you mean `inrun top`?" in capsys.readouterr().err
    assert main(["top", str(folder), "--taget", "math"]) == 2
    assert "--target" in capsys.readouterr().err


def test_an_interrupt_is_status_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("inrun.cli.top.run", interrupt)
    assert main(["top", str(folder)]) == 130


def test_a_missing_package_is_told_with_what_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "inrun.report.page", raising=False)
    monkeypatch.delattr("inrun.report.page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(folder)]) == 1
    assert "pip install 'inrun[report]'" in capsys.readouterr().err


def test_top_loads_neither_torch_nor_transformers_nor_plotly(folder: Path) -> None:
    code = (
        "import sys; from inrun.cli.main import main; status = main(['top', sys.argv[1]]); "
        "print(sorted({'torch', 'transformers', 'plotly', 'jinja2'} & set(sys.modules))); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_traceback(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "inrun.cli.main", "top", str(folder), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 141
    assert errors == b""


def test_a_full_disk_under_the_output_is_told(folder: Path) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    for options in ([], ["--json"]):
        command = [sys.executable, "-m", "inrun.cli.main", "top", str(folder), *options]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == "inrun top: the disk that is written to is full: free space, then try again.\n"
