"""The study of replay against training again, at its smallest, from data to result."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.replay import run, training
from experiments.results import auroc, spearmans, table_rows
from experiments.retraining import loss_alone, losses_at_end
from inrun.game import spearman
from tests.experiments.quick import carried_out, gone_on


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    methods = {(row["optimizer"], row["method"]): row for row in table_rows(result["methods"])}
    for optimizer in ("adamw", "momentum"):
        mine = {method: row for (of, method), row in methods.items() if of == optimizer}
        assert list(mine) == list(training.QUICK.methods)
        assert mine["replay"]["lds_weightless_0.9"][0] > 0.8 > mine["random"]["lds_weightless_0.9"][0]
    assert all(row["single_spearman"][0] > 0.9 for row in table_rows(result["runs"]) if row["activation"] == "GELU")
    for row in table_rows(result["sizes"]):
        if row["size"] < 1e-4:  # there first order is all there is
            assert row["spearman"][0] == 1
            assert row["slope"][0] == pytest.approx(1, abs=1e-3)
    assert "| AdamW | replay | " in page

    repeated = gone_on(run, tmp_path, "adamw-0.003-gelu-cosine-subsets-seed0.npz")
    assert result | {"seconds": 0} == repeated | {"seconds": 0}


def test_with_all_examples_it_is_the_run_and_without_some_one_that_never_saw_them() -> None:
    piece = next(training.pieces_of(training.QUICK))
    these = training.Run(training.QUICK, piece, torch.float64)
    keep = torch.ones(3, training.QUICK.examples, dtype=torch.bool)
    keep[1:, ::3] = False
    model, optimizer = these.make()
    for _, batch in these.batches(optimizer):
        optimizer.zero_grad()
        training.loss(model, batch).backward()
        optimizer.step()
    whole = float(training.loss(model, these.data.target).detach())
    for removed in (False, True):
        ends = losses_at_end(these, keep, removed)
        assert float(ends[0]) == pytest.approx(whole, abs=1e-12)
        assert float(ends[1]) == pytest.approx(loss_alone(these, keep[1], removed), abs=1e-12)
    these.data.x[::3] = 100.0  # of those left out nothing may come in
    assert float(losses_at_end(these, keep, True)[2]) == pytest.approx(float(ends[2]), abs=1e-12)


def test_the_bootstrap_repeats_what_a_resample_is() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 30))
    drawn = random.integers(30, size=30)
    counts = np.bincount(drawn, minlength=30).astype(float)[None]
    expected = spearman(torch.from_numpy(x[drawn]), torch.from_numpy(y[drawn]))
    assert spearmans(x, y, counts)[0] == pytest.approx(expected)


def test_auroc() -> None:
    values = np.array([0.1, 0.5, 0.3, 0.9])
    assert auroc(values, np.array([True, False, True, False])) == 1
    assert auroc(values, np.array([False, True, True, False])) == 0.5
