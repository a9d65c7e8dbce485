"""The study of refresh and rotation, at its smallest, from text to result."""

from pathlib import Path

import numpy as np
import pytest

from experiments.refresh import report, run, training
from experiments.results import table_rows
from tests.experiments.quick import carried_out, gone_on


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    found = {(row["optimizer"], row["refresh"]): row for row in table_rows(result["refresh"])}
    for optimizer in ("sgd", "adamw"):
        taken = [found[optimizer, k]["taken"][0] for k in training.QUICK.refresh]
        steps = range(1, training.QUICK.steps + 1)
        assert taken == [len({step // k for step in steps}) for k in training.QUICK.refresh]
        assert found[optimizer, 1]["step_error"] == [0, 0, 0]
        assert 0 < found[optimizer, 2]["step_error"][0] < found[optimizer, 4]["step_error"][0] < 1
        assert found[optimizer, 2]["example_spearman"][0] > 0.9
    for row in table_rows(result["rotation"]):
        assert -1 <= row["example_spearman"][0] <= 1
        assert 0 <= row["top"][0] <= 1
    assert "| AdamW, 0.005 | 4 |" in page

    written = (tmp_path / "out" / "result.json").read_text("utf-8")
    gone_on(run, tmp_path, "adamw-0.005-first-refresh2-seed0.npz")
    assert (tmp_path / "out" / "result.json").read_text("utf-8") == written


def test_a_step_that_takes_the_gradient_has_its_own_values(tmp_path: Path) -> None:
    text = tmp_path / "text.npz"
    training.write_text(training.QUICK, text)
    every, third = (
        training.train(training.QUICK, text, training.Piece("adamw", 5e-3, "first", refresh, 0)) for refresh in (1, 3)
    )
    taken = third["taken-mixed-4"] > 0
    assert every["weights"] == third["weights"]
    assert np.array_equal(every["values-mixed-4"][taken], third["values-mixed-4"][taken])
    assert not (every["values-mixed-4"] == third["values-mixed-4"])[~taken].all(axis=1).any()


def test_totals_by_example_and_source() -> None:
    places, source = np.array([[0, 1], [1, 2]]), np.array([0, 0, 1])
    truth = np.array([[1.0, 1.0], [1.0, 4.0]])  # 1, 2 and 4 by example, 3 and 4 by source
    values = np.array([[2.0, 1.0], [0.0, 4.0]])  # 2, 1 and 4; 3 and 4
    found = report.by_total({"places": places, "source": source}, values, truth)
    assert found == pytest.approx(
        {
            "example_error": (2 / 21) ** 0.5,
            "example_spearman": 0.5,
            "top": 1.0,
            "source_error": 0.0,
            "source_spearman": 1.0,
        }
    )


def test_a_mean_over_unrelated_sequences() -> None:
    random = np.random.default_rng(0)
    sequences, size, draws = 12, 3, 5
    values = random.normal(size=(sequences, 4000))  # of 4000 examples
    batches = values.reshape(sequences // size, size, -1).mean(axis=1)
    drawn = np.take_along_axis(batches, random.integers(len(batches), size=(draws, 4000)), axis=0).mean(axis=0)
    measured = np.corrcoef(drawn, values.mean(axis=0))[0, 1]
    assert measured == pytest.approx(report.unrelated(sequences, size, draws), abs=0.03)
    assert report.unrelated(sequences, sequences, 1) == 1
