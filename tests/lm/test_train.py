"""`inrun train` on a small corpus of real text: what it leaves, and what it refuses before it begins."""

import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import tyro
from rich.console import Console

from inrun import InrunError, Ledger
from inrun.cli.main import main
from inrun.lm.config import Train
from inrun.lm.place import held, held_already
from inrun.lm.presets import PRESETS
from inrun.lm.tokens import TokenStore, load_tokenizer
from inrun.lm.train import _arguments, train
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


def test_every_token_has_a_value_and_a_text_in_the_report(corpus: Path, tmp_path: Path) -> None:
    run = train(replace(small(corpus, tmp_path / "run"), token_values=True), Console(quiet=True))
    ledger = Ledger(run)
    texts = dict(pl.read_parquet(run / "examples.parquet")["id", "token_texts"].iter_rows())
    previews = dict(pl.read_parquet(run / "examples.parquet")["id", "preview"].iter_rows())
    values = ledger.values("code")
    for name, value in values["id", "value"].iter_rows():
        of_tokens = ledger.token_values(name, "code")
        assert of_tokens is not None
        assert len(of_tokens) == len(texts[name]) <= 32  # without padding
        assert of_tokens.sum() == pytest.approx(value, rel=1e-6, abs=1e-12)
        assert previews[name][:8] in "".join(texts[name])
    assert values.height == 6 * 4
    assert main(["report", str(run)]) == 0
    assert "shaded by theirs" in " ".join((run / "report.html").read_text().split())


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
        ({"steps": 0}, "--steps 0: give a number of 1 or more"),  # not the preset's 1,000
        ({"sequence": 0}, "--sequence 0: give a number of 2 or more"),
        ({"accumulation": 0}, "--accumulation 0"),
        ({"save_every": 0}, "--save-every 0"),
        ({"learning_rate": -1.0}, "--learning-rate -1.0: give a number of 0 or more"),
        ({"clip": float("nan")}, "--clip nan"),
        ({"seed": -1}, "--seed -1: give a number from 0 to 4294967295"),
        ({"steps": None, "epochs": 0.0}, "--epochs 0.0: give a number above 0"),
        ({"target_share": 1.0}, "--target-share 1.0: give a share"),
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
    for changes, says in (
        ({"nodes": 3}, r"--nodes 3 \(the run has 1\)"),
        (
            {"kernel": "perexample", "refresh": 2},
            r"--refresh 2 \(the run has 1\); --kernel perexample \(the run has auto\)",
        ),
        ({"memory": 2**30}, r"--memory 1073741824 \(the run has auto\)"),
    ):
        with pytest.raises(InrunError, match=f"other options: {says}"):
            train(replace(config, steps=2, resume=True, **changes), Console(quiet=True))
    with pytest.raises(InrunError, match=r"no run to resume here"):
        train(Train(out=tmp_path / "none", resume=True), Console(quiet=True))


def test_a_run_that_could_not_begin_leaves_its_folder_free(corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, tmp_path / "run")
    for changes in ({"target": ("t=missing.txt",)}, {"data": ("missing.txt",)}, {"model": "huge"}):
        with pytest.raises(InrunError):
            train(replace(config, vocab_size=300, **changes), Console(quiet=True))
        assert held_already(config.out) is None
    train(replace(config, steps=1), Console(quiet=True))  # and nothing of the wrong ones is taken over
    assert len(load_tokenizer(config.out / "tokenizer")) == 400


def test_what_stands_in_a_folder_is_never_taken_for_the_runs(corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, tmp_path / "run")
    (config.out / "tokens").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(InrunError, match=r"already holds a run \(tokens\): choose another folder with --out\."):
            train(replace(config, resume=resume), Console(quiet=True))
    assert [path.name for path in config.out.iterdir() if path.name != ".lock"] == ["tokens"]


def test_groups_of_any_name_are_targets_inside_the_runs_folder(tmp_path: Path) -> None:
    groups = ["a/b", "..", str(tmp_path / "escaped"), "x" * 300, "", "Code", "code", ".hidden", "a\0b", "\u043a [red]"]
    rows = [
        {"id": f"{number}-{k}", "text": f"{k} is in group {number} of this text", "domain": group}
        for number, group in enumerate(groups)
        for k in range(4)
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(small(corpus, tmp_path / "run"), vocab_size=300, steps=2)
    run = train(config, Console(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "run"]
    folders = [path.name for path in (run / "targets").iterdir()]
    assert len({name.lower() for name in folders}) == len(folders) == len(groups)
    ledger = Ledger(run)
    assert ledger.targets == sorted(groups)
    values = ledger.values()
    for place in (run / "targets").iterdir():  # each target is its own group's text
        of = TokenStore(place)
        assert of.examples()["domain"].unique().to_list() == [of.meta["settings"]["target"]]
    # the targets are found again under their names, without the text
    corpus.unlink()
    assert main(["train", "--out", str(run), "--resume"]) == 0
    shutil.rmtree(run / "checkpoints")
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert Ledger(run).values().sort("id", "target").equals(values.sort("id", "target"))


def test_a_folder_is_one_processs_at_a_time(corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, tmp_path / "run")
    with held(config.out), pytest.raises(InrunError, match="another process is training in this folder"):
        train(config, Console(quiet=True))
    with pytest.raises(InrunError, match=r"cannot be made or written to \(Not a directory\)"):
        train(replace(config, out=corpus / "run"), Console(quiet=True))


@pytest.mark.parametrize("limit", [3_000_000, 4_000_000])  # bytes: less than the weights, than the optimizer's state
def test_a_disk_that_is_full_at_a_checkpoint_is_told_and_the_run_goes_on_later(
    corpus: Path, tmp_path: Path, limit: int
) -> None:
    config = replace(small(corpus, tmp_path / "a run"), steps=4, save_every=2)
    whole = Ledger(train(replace(config, out=tmp_path / "whole"), Console(quiet=True))).values("code")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            InrunError, match=r"could not be written .* go on with: inrun train --out '.*a run' --resume"
        ):
            train(config, Console(quiet=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert main(["train", "--out", str(config.out), "--resume"]) == 0
    assert Ledger(config.out).values("code").equals(whole)


def test_a_warm_up_that_was_asked_for_is_kept(corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, tmp_path)
    tiny = PRESETS["tiny"]
    assert _arguments(config, tiny, 6).warmup_steps == 3  # the preset's 100 are more than half of the run
    assert _arguments(replace(config, warmup_steps=5), tiny, 6).warmup_steps == 5


def test_interrupted_says_how_to_go_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inrun.lm.train.build", interrupted)
    run = tmp_path / "a run"
    options = ["--target-from", "domain", "--target-share", "0.2", "--steps", "2", "--vocab-size", "300"]
    assert main(["train", str(corpus), "--out", str(run), *options]) == 130
    assert f"go on with: inrun train --out '{run}' --resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["train", "--out", str(run), "--resume"]) == 0


def test_a_closed_pipe_ends_a_run_with_a_word_on_how_to_go_on(corpus: Path, tmp_path: Path) -> None:
    options = ["--target-from", "domain", "--target-share", "0.2", "--steps", "2", "--vocab-size", "300"]
    command = [sys.executable, "-m", "inrun.cli.main", "train", str(corpus), "--out", str(tmp_path / "run"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 141
    assert "go on with: inrun train" in told
    assert "Traceback" not in told


@pytest.mark.filterwarnings("ignore:what a step must keep")
@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": "credit"},
        {"scheme": "first", "refresh": 5, "kernel": "perexample"},
        {"kernel": "tangent", "memory": 500_000},
    ],
)
def test_a_run_goes_on_from_its_checkpoint(corpus: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Broken off after a checkpoint and resumed, its ledger is that of the run in one piece."""
    config = replace(small(corpus, tmp_path / "run"), **changes)
    train(config, Console(quiet=True))
    stored = json.loads((config.out / "config.json").read_text())
    assert {name: stored[name] for name in changes} == changes
    whole = Ledger(config.out).scan().collect(), Ledger(config.out).steps()
    assert whole[0]["step"].n_unique() == 6
    shutil.rmtree(config.out / "checkpoints" / "checkpoint-6")
    shutil.rmtree(config.out / "model")
    train(Train(out=config.out, resume=True), Console(quiet=True))
    resumed = Ledger(config.out).scan().collect(), Ledger(config.out).steps()
    assert resumed[0].equals(whole[0])
    assert resumed[1].equals(whole[1])


def test_what_a_run_is_told_reaches_the_attributor(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def attach(*_: Any, **settings: Any) -> None:
        told.update(settings)
        raise InrunError("told")

    monkeypatch.setattr("inrun.lm.train.attach", attach)
    wanted: dict[str, Any] = {"scheme": "first", "refresh": 3, "kernel": "tangent", "memory": 2**20}
    with pytest.raises(InrunError, match="told"):
        train(replace(small(corpus, tmp_path / "run"), **wanted), Console(quiet=True))
    assert wanted.items() <= told.items()


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [("auto", "auto"), ("0", 0), ("2000000000", 2_000_000_000), ("1.5GiB", 3 * 2**29), ("64KiB", 2**16)],
)
def test_memory_is_given_in_bytes_or_larger_units(given: str, bytes_: object) -> None:
    assert tyro.cli(Train, args=["corpus.jsonl", "--memory", given]).memory == bytes_


@pytest.mark.parametrize("given", ["2GB", "-1", "much", "GiB", ""])
def test_memory_in_other_units(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "corpus.jsonl", "--memory", given]) == 2
    assert "as 2000000000 or 2GiB" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"scheme": "second", "nodes": 3}, "takes no nodes"),
        ({"nodes": "adaptive", "tolerance": 2.0}, "tolerance=2"),
        ({"momentum": "credit", "audit_permutations": 9}, "--momentum credit goes with none of"),
        ({"momentum": "credit", "scheme": "first", "refresh": 2}, "--momentum credit goes with none of .*--refresh"),
        ({"refresh": 2}, "refresh=2 with scheme='path'"),
        ({"scheme": "first", "refresh": 0}, "--refresh 0: give a number of 1 or more"),
        ({"kernel": "ghost"}, "--kernel ghost is for SGD"),
        ({"memory": -1}, "--memory -1: give a number of 0 or more"),
    ],
)
def test_schemes_that_do_not_exist_are_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    config = replace(small(corpus, tmp_path / "run"), **changes)
    with pytest.raises(InrunError, match=says):
        train(config, Console(quiet=True))
    assert held_already(config.out) is None
