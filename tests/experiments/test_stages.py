"""The study of which source helps when, at its smallest, from text to result."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.language import mean_loss_of, model_of, optimizer_of, set_rate, train_step
from experiments.results import table_rows
from experiments.stages import run, training
from experiments.stages.config import LEFT_OUT, QUICK, Piece
from tests.experiments.quick import carried_out


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    books = {row["scheme"]: row for row in table_rows(result["books"])}
    assert books["path, credit"]["sum_of_values"][0] == pytest.approx(books["path, credit"]["drop"][0], rel=0.1)
    stages = [row for row in table_rows(result["stages"]) if row["scheme"] == "path, credit"]
    whole = sum(row["nats"][0] for row in stages if "." not in row["stage"])
    assert whole == pytest.approx(books["path, credit"]["sum_of_values"][0], rel=1e-2)
    windows = table_rows(result["windows"])
    (mine,) = [row for row in windows if (row["window"], row["source"]) == (1, "scripture")]
    assert mine["worse"][0] > 0 < mine["value, path, credit"][0]  # without its own kind the target's loss is higher
    assert "| all | scripture | path, credit |" in page


def test_a_window_without_a_source_goes_on_from_the_run(tmp_path: Path) -> None:
    """By hand, for the last window: the same steps, whose batches are of the other source alone."""
    study = replace(QUICK, steps=6, windows=2, stages=2)
    text, piece = tmp_path / "text.npz", Piece("all", 0, LEFT_OUT)
    training.write_text(study, text)
    found = training.without_sources(study, text, piece)["worse"]
    data = training.data_of(study, text, piece)
    ends = []
    for without in (None, 1):
        model = model_of(study, 0)
        optimizer = optimizer_of(study, model)
        for step in range(study.steps):
            set_rate(study, optimizer, step)
            of = np.arange(step * study.batch, (step + 1) * study.batch)
            if step >= 3 and without is not None:
                of = of[data.source[of] != without]
            train_step(model, optimizer, data.blocks[torch.from_numpy(of)])
        ends.append(mean_loss_of(model, data.targets["scripture"]))
    assert found[1, 1, 0] == pytest.approx(ends[1] - ends[0], abs=1e-7)


def test_nothing_held_out_is_trained_on(tmp_path: Path) -> None:
    text = tmp_path / "text.npz"
    training.write_text(QUICK, text)
    with np.load(text) as arrays:
        rows = {name: set(map(bytes, arrays[name])) for name in arrays.files}
    assert rows["scripture"]
    assert rows["held out scripture"]
    assert not rows["scripture"] & rows["held out scripture"]
