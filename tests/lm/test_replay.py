"""`inrun train --replayable`, then `inrun replay`: for the run's own targets, and for a text named later."""

from pathlib import Path

import pytest

import inrun
from inrun.cli.main import main
from tests.lm.corpus import write_corpus


def test_a_run_is_replayed_for_its_targets_and_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, run = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "run"
    options = ["--target-from", "domain", "--target-share", "0.2", "--target-examples", "6", "--target-batch", "3"]
    options += ["--vocab-size", "300", "--sequence", "16", "--batch", "2", "--accumulation", "2", "--steps", "6"]
    options += ["--audit-every", "0"]
    assert main(["train", str(corpus), "--out", str(run), *options, "--replayable", "--replay-every", "4"]) == 0
    assert main(["replay", str(run)]) == 0
    own = inrun.Ledger(run).targets
    later = write_corpus(tmp_path / "later.jsonl")
    assert main(["replay", str(run), "--target", f"later={later}"]) == 0
    out = capsys.readouterr().out
    assert "replay 6/6 steps" in out
    assert f"inrun top {run} --scheme replay" in out
    ledger = inrun.Ledger(run, scheme="replay")
    assert ledger.targets == [*own, "later"]
    assert ledger.values("later")["count"].sum() == 6 * 4
    assert inrun.replay(run, horizon=0).scheme == "replay-h0"
    assert main(["by", str(run), "domain", "--scheme", "replay"]) == 0
    assert main(["replay", str(run), "--target", f"{own[0]}={later}"]) == 1
    assert "has a target of this name" in capsys.readouterr().err


def test_a_run_that_was_not_recorded_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 1
    assert "holds no run of `inrun train`" in capsys.readouterr().err
    assert main(["replay", str(tmp_path), "--target", "nothing"]) == 1
    assert "NAME=FILE" in capsys.readouterr().err
