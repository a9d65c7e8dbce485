"""The study of wrong labels, at its smallest, from images to result."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from experiments.mislabel import rivals, run, training
from experiments.mislabel.config import QUICK, Piece, Study
from experiments.results import table_rows
from tests.experiments.quick import carried_out


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    methods = {row["method"]: row["auroc"][0] for row in table_rows(result["methods"])}
    assert {"path", "path, by step", "second", "path, credit", "sgd-proxy", "TracIn", "EL2N"} < set(methods)
    (only,) = table_rows(result["runs"])
    assert 0.7 < only["sum_of_values"][0] / only["drop"][0] < 1.3  # the values are those of what training did
    selection = {(row["method"], row["kept"]): row for row in table_rows(result["selection"])}
    assert selection["all images", 1.0]["wrong"][0] == round(QUICK.wrong * QUICK.examples)
    assert "| sgd-proxy | " in page


def test_the_proxy_is_first_order_under_sgd() -> None:
    """By hand: for two steps, at the weights of each."""
    study = replace(QUICK, examples=16, epochs=1)
    piece = Piece("blobs", 3, "passes")
    found = rivals.passes(replace(study, checkpoints=1), piece)["sgd-proxy"]
    again = training.run_of(study, piece)
    model, data = again.model(), again.data
    optimizer, wanted = again.optimizer(model), np.zeros(study.examples)
    for step, (_, places) in enumerate(data.steps(study.batch)):
        part = slice(step * study.batch, (step + 1) * study.batch)
        g = torch.autograd.grad(
            training.loss(model, (data.target[0][part], data.target[1][part])), list(model.parameters())
        )
        for place in places.tolist():
            own = F.cross_entropy(model(data.x[place : place + 1]), data.y[place : place + 1])
            each = torch.autograd.grad(own, list(model.parameters()))
            product = sum(float((a * b).sum()) for a, b in zip(each, g, strict=True))
            wanted[place] += study.rate / study.batch * product
        again.step(model, optimizer, places)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)


def test_wrong_labels_are_wrong_and_the_rest_is_right() -> None:
    clean, data = training.data_of(replace(QUICK, wrong=0.0), "blobs", 1), training.data_of(QUICK, "blobs", 1)
    assert torch.equal(clean.x, data.x)
    assert torch.equal(clean.y != data.y, data.wrong)
    assert int(data.wrong.sum()) == round(QUICK.wrong * QUICK.examples)
    assert Study().fingerprint() != QUICK.fingerprint()


def test_values_by_epoch_add_up(tmp_path: Path) -> None:
    found: dict[str, Any] = training.valued(QUICK, Piece("blobs", 0, "in-run first"))
    assert found["first"].shape == (QUICK.epochs, QUICK.examples)
    assert (found["first"] != 0).all()  # every image is used once an epoch
    by_step = np.abs(found["first, by step"]).sum()
    np.testing.assert_allclose(by_step, QUICK.steps)
