"""`inrun train` on a small corpus of real text: what it leaves, and what it refuses before it begins."""

import json
import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from inrun import InrunError, Ledger
from inrun.cli.main import main
from inrun.lm.config import Train
from inrun.lm.presets import PRESETS
from inrun.lm.train import train
from tests.lm.corpus import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def small(corpus: Path, out: Path) -> Train:
    return Train(
        data=(str(corpus),), out=out, vocab_size=400, sequence=32, batch=4, steps=6, target_from="domain",
        target_share=0.2, target_examples=4, target_batch=2, audit_every=3, save_every=3,
    )  # fmt: skip


def test_a_run_leaves_values_for_every_target_and_goes_on_from_what_it_stored(corpus: Path, tmp_path: Path) -> None:
    run = train(small(corpus, tmp_path / "run"), Console(quiet=True))
    ledger = Ledger(run)
    assert ledger.targets == ["code", "scripture"]
    values = ledger.values("code")
    assert values["count"].sum() == 6 * 4
    held_out = {row["document"] for row in pl.read_parquet(run / "targets/code/examples.parquet").to_dicts()}
    examples = pl.read_parquet(run / "examples.parquet")
    assert held_out
    assert not held_out & set(examples["document"])  # a target is never trained on
    assert set(values["id"]) <= set(examples["id"])
    assert {"id", "document", "domain", "tokens", "preview"} <= set(examples.columns)
    assert set(ledger.by("domain", "code")["domain"]) == {"code", "scripture"}
    steps = ledger.steps("code")
    assert steps["loss_before"].is_null().to_list() == [True, True, False, True, True, False]
    assert steps["train_loss"].null_count() == 0
    assert (run / "model" / "model.safetensors").exists()
    stored = json.loads((run / "config.json").read_text())
    assert (stored["steps"], stored["target_from"]) == (6, "domain")
    # the stored configuration is enough to resume; the run is at its end, and nothing changes
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert Ledger(run).values("code").equals(values)


def test_targets_from_files_and_passes_over_the_text(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text("And it came to pass in those days, that there went out a decree. " * 6)
    config = replace(small(corpus, tmp_path / "run"), target=(f"verse={tmp_path / 'verse.txt'}",), target_from=None)
    run = train(replace(config, steps=None, epochs=0.2, batch=8), Console(quiet=True))
    ledger = Ledger(run)
    assert ledger.targets == ["verse"]
    examples = pl.read_parquet(run / "examples.parquet").height
    assert ledger.steps().height == -(-examples * 2 // 80)


def test_the_papers_presets_have_the_papers_settings() -> None:
    for name in ("gpt2-small", "pythia-410m"):
        preset = PRESETS[name]
        assert (preset.sequence, preset.batch, preset.betas, preset.weight_decay) == (1024, 16, (0.9, 0.95), 0.1)
        assert (preset.learning_rate, preset.min_learning_rate, preset.warmup_steps, preset.clip) == (
            6e-4,
            6e-5,
            2000,
            1.0,
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": ()}, "no text to train on"),
        ({"target_from": None}, "no target"),
        ({"target": ("math",)}, "NAME=FILE"),
        ({"target": ("a=x", "a=y")}, "NAME=FILE"),
        ({"target": ("../a=x",)}, "NAME=FILE"),
        ({"epochs": 1.0}, "--steps and --epochs"),
        ({"target_from": "colour"}, "no document has a value in column 'colour'.*domain"),
        ({"model": "huge"}, "'huge' is no preset"),
        ({"target": ("t=missing.txt",), "target_from": None}, "missing.txt"),
    ],
)
def test_options_of_no_use(corpus: Path, tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(InrunError, match=says):
        train(replace(small(corpus, tmp_path / "run"), **changes), Console(quiet=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "corpus.jsonl: holds no documents"),
        (b'{"text": "one"}\n{"text": \n', r"corpus.jsonl.*2"),
        (b'{"text": "one"}\n{"text": "\xff\xfe"}\n', r"corpus.jsonl.*2.*UTF-8"),
        (b'{"body": "one"}\n', "corpus.jsonl.*1.*body"),
    ],
)
def test_text_that_cannot_be_read_is_told_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    bad = tmp_path / "corpus.jsonl"
    bad.write_bytes(content)
    target = tmp_path / "t.txt"
    target.write_text("a target of a few words")
    assert main(["train", str(bad), "--out", str(tmp_path / "run"), "--target", f"t={target}"]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(says, message), message
    assert "Traceback" not in message


def test_a_folder_with_a_run_and_a_resumption_with_other_options_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, tmp_path / "run")
    train(replace(config, steps=2), Console(quiet=True))
    with pytest.raises(InrunError, match=r"already holds a run.*--resume"):
        train(config, Console(quiet=True))
    with pytest.raises(InrunError, match=r"other options: --nodes 3 \(the run has 1\)"):
        train(replace(config, steps=2, nodes=3, resume=True), Console(quiet=True))
    with pytest.raises(InrunError, match=r"no run to resume here"):
        train(Train(out=tmp_path / "none", resume=True), Console(quiet=True))
