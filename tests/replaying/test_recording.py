"""What a run keeps, and what becomes of it: cut, torn, damaged, thinned out; and runs that cannot be repeated."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from inrun import Attributor, InrunError, Recording, RecordingError, replay
from inrun.replaying import walk
from inrun.replaying.book import Walk
from inrun.replaying.record import Record
from inrun.replaying.store import place_of
from tests.models import CASES, GPT, Case, token_losses, tokens
from tests.replaying.runs import Run, largest_difference

DROPOUT = Case(lambda: GPT(dropout=0.2), tokens, token_losses)


def test_dropout_and_half_precision_are_repeated_bit_for_bit_in_pieces_of_a_segment(tmp_path: Path) -> None:
    run = Run(DROPOUT, folder=tmp_path / "run", steps=8, cast=torch.bfloat16, recording={"every": 8})
    model = run.record()
    after, optimizer = run.make()
    ledger = replay(
        run.folder,
        {"t": run.target()},
        run.case.loss,
        model=after,
        optimizer=optimizer,
        train_loss=run.loss,
        memory=1,
        progress=lambda *_: None,
    )
    for p, q in zip(model.parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q)
    assert largest_difference(run.values(run.replay({"u": run.target()}), "u"), run.values(ledger)) < 1e-12
    assert ledger.steps()["conservation"].max() < 1e-3  # type: ignore[operator]


def test_a_loss_that_runs_only_the_model_in_half_precision_is_repeated_so(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        return cross_entropy(logits, y) / 2  # of bfloat16

    run = Run(folder=tmp_path / "run", steps=2)
    run.loss = loss  # type: ignore[method-assign]
    run.record()
    assert len(run.values(run.replay())) == 2


def test_a_run_resumed_after_a_crash_is_replayed_as_if_it_had_not_crashed(tmp_path: Path) -> None:
    whole = Run(DROPOUT, folder=tmp_path / "whole")
    whole.record()
    expected = whole.values(whole.replay())
    run = Run(DROPOUT, folder=tmp_path / "crashed")

    def crash(step: int, model: nn.Module) -> None:
        if step == 5:
            raise KeyboardInterrupt

    run.record(until=3)
    state = torch.load(run.folder.with_suffix(".pt"))
    run.wrong = crash
    with pytest.raises(KeyboardInterrupt):
        run.record(resume=True)
    run.wrong = lambda step, model: None
    for name in ("steps.jsonl", "tensors.bin"):  # torn ends
        with open(place_of(run.folder) / name, "ab") as file:
            file.write(b'{"step": 6, "batches": [{"ids"')
    (place_of(run.folder) / "checkpoints" / ".000000006.safetensors.tmp").write_bytes(b"torn")
    torch.save(state, run.folder.with_suffix(".pt"))
    run.record(resume=True)
    assert largest_difference(run.values(run.replay()), expected) == 0


def test_checkpoints_take_no_more_than_they_may(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", steps=24, recording={"every": 1})
    run.record(until=2)
    size = max(path.stat().st_size for path in (place_of(run.folder) / "checkpoints").iterdir())
    run = Run(folder=tmp_path / "thin", steps=24, recording={"every": 1, "disk": 5 * size})
    run.record()
    kept = Record(run.folder).checkpoints()
    assert len(kept) <= 5
    assert kept[0] == 0
    assert kept[-1] == 24
    whole = Run(folder=tmp_path / "whole", steps=24)
    whole.record()
    assert largest_difference(run.values(run.replay()), whole.values(whole.replay())) == 0


def nudge(step: int, model: nn.Module) -> None:
    """Weights that are changed beside the optimizer."""
    if step == 4:
        with torch.no_grad():
            next(model.parameters())[0] += 1e-3


def damage(run: Run) -> None:
    path = place_of(run.folder) / "checkpoints" / "000000004.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: setattr(run, "optimizer", "sgd"), "the optimizers or their groups of parameters are"),
        (lambda run: setattr(run, "case", CASES["convolutional"]), "the trained parameters .* are"),
        (lambda run: setattr(run, "loss", run.case.loss), "repeating step 5 leads to other weights.*train_loss"),
        (damage, "000000004.safetensors is damaged"),
        (lambda run: (place_of(run.folder) / "run.json").unlink(), "was not recorded.*replayable=True"),
        (lambda run: (place_of(run.folder) / "checkpoints" / "000000000.safetensors").unlink(), "beginning is missing"),
    ],
)
def test_what_is_not_the_run_is_refused(tmp_path: Path, change: Callable[[Run], Any], words: str) -> None:
    run = Run(folder=tmp_path / "run")
    run.record()
    change(run)
    with pytest.raises(RecordingError, match=words):
        run.replay()


def test_averaged_weights_in_place_of_the_runs_own_at_its_end_are_not_taken_for_them(tmp_path: Path) -> None:
    def average(step: int, model: nn.Module) -> None:
        if step == run.steps:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)

    run, whole = Run(folder=tmp_path / "run", wrong=average), Run(folder=tmp_path / "whole")
    run.record()
    whole.record()
    assert Record(run.folder).checkpoints() == [0, 2, 4]
    run.wrong = whole.wrong
    assert largest_difference(run.values(run.replay()), whole.values(whole.replay())) == 0


def test_weights_changed_beside_the_optimizer_are_noticed(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", wrong=nudge, recording={"every": 10})
    run.record()
    with pytest.raises(RecordingError, match="repeating step 5 leads to other weights"):
        run.replay()


def test_a_gradient_that_is_changed_otherwise_than_was_said_stops_the_run(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", clip=0.01)
    with pytest.raises(RecordingError, match=r"step 1: .*Say what is done .*Recording\(clip_norm="):
        run.record(replayable=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ledger": None}, "give ledger="),
        ({"kernel": "perexample"}, "kernel='perexample' adds"),
        ({"nonfinite": "skip"}, "nonfinite='skip'"),
        ({"replayable": Recording(every=0)}, "every=0"),
        ({"replayable": Recording(clip_norm=1.0, clip_value=1.0)}, "not both"),
    ],
)
def test_settings_that_cannot_be_repeated_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    run = Run()
    model, optimizer = run.make()
    given: dict[str, Any] = {"ledger": tmp_path, "replayable": True, **settings}
    with pytest.raises(InrunError, match=words):
        Attributor(model, optimizer, {"t": run.target()}, run.case.loss, **given)


def test_a_replay_that_breaks_off_anywhere_goes_on_to_the_same_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_SAVE_EVERY", 0.0)
    whole = Run(DROPOUT, folder=tmp_path / "whole", steps=9, recording={"every": 4})
    whole.record()
    expected = whole.replay()
    run = Run(DROPOUT, folder=tmp_path / "run", steps=9, recording={"every": 4})
    run.record()
    chance, stopped = random.Random(3), 0
    write = Walk.save

    def save(self: Walk, *given: Any) -> None:
        nonlocal stopped
        if chance.random() < 0.4:  # before or after it is saved
            stopped += 1
            if chance.random() < 0.5:
                write(self, *given)
            raise KeyboardInterrupt
        write(self, *given)

    monkeypatch.setattr(Walk, "save", save)
    ledger = None
    while ledger is None:
        try:
            ledger = run.replay()
        except KeyboardInterrupt:
            continue
    assert stopped > 3
    order = ["step", "target", "id", "value"]
    assert ledger.scan().collect().sort(order).equals(expected.scan().collect().sort(order))
    assert ledger.steps().equals(expected.steps())
    assert not list((place_of(run.folder) / "walks").iterdir())


SCRIPT = """
import sys
from pathlib import Path
from inrun.replaying import walk
from tests.replaying.runs import Run
walk._SAVE_EVERY = 0.0
run = Run(folder=Path(sys.argv[1]), steps=120)
print("begun", flush=True)
run.replay()
"""


def test_a_killed_replay_resumes_to_the_same_ledger(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", steps=120)
    run.record()
    chance, environment = random.Random(5), os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(run.folder)], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0.3, 1.0))
            assert process.poll() is None, "it ended before it was killed"
            process.send_signal(signal.SIGKILL)
    killed = run.values(run.replay())
    assert largest_difference(killed, run.values(run.replay({"again": run.target()}), "again")) == 0
