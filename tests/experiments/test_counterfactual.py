"""The study of removals, at its smallest, from data to result."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import retraining
from experiments.counterfactual import run, training, truth
from experiments.counterfactual.config import METHODS, QUICK, Piece
from experiments.counterfactual.data import write_text
from experiments.counterfactual.training import Run, other
from experiments.pieces import hash_of
from experiments.results import table_rows
from tests.experiments.quick import carried_out

MLP, GPT, LORA = QUICK.models
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(QUICK, tmp_path / "text.npz")
    return tmp_path / "text.npz"


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    methods = {(row["model"], row["method"]): row for row in table_rows(result["methods"])}
    assert list(methods) == [(model.name, name) for model in QUICK.models for name in METHODS]
    for model in (MLP, GPT):
        assert methods[model.name, "replay"]["lds_weightless_0.9"][0] > 0.7
        assert methods[model.name, "replay"]["sign_single"][0] == 1
    removals = {(row["model"], row["method"]): row for row in table_rows(result["removals"])}
    for model in QUICK.models:  # positive helps: without the highest values the loss is higher
        assert removals[model.name, "replay"]["highest"][0] > 0 > removals[model.name, "replay"]["lowest"][0]
    assert "| LoRA | replay | " in page


def test_a_change_is_that_of_training_without(text: Path) -> None:
    """By hand: the mean of a batch is over those that are left, and the values' own run is the one with all."""
    again = Run(GPT, 0, text)
    keep = torch.ones(3, GPT.examples, dtype=torch.bool)
    keep[1, ::4] = keep[2, 1] = False
    model, optimizer = again.make()
    for places, (inputs, labels) in again.batches(optimizer):
        left = keep[1][places]
        again.loss(model, (inputs[left], labels[left])).backward()
        optimizer.step()
        optimizer.zero_grad()
    without = float(again.loss(model, again.target).detach())
    whole = float(again.loss(again.trained(), again.target).detach())
    changes = truth.changes(again, keep)
    assert changes[0] == pytest.approx(0, abs=1e-6)
    assert changes[1] == pytest.approx(without - whole, abs=1e-5)
    assert training.in_run(Piece(GPT, 0, "in-run first"), text)["target"][1] == pytest.approx(whole, abs=1e-6)


def test_another_beginning_has_the_same_examples_in_another_order(text: Path) -> None:
    for model in (MLP, GPT):
        own, begun = Run(model, 0, text), Run(model, 0, text, other(0, 0))
        assert torch.equal(own.data.train[0], begun.data.train[0])
        assert torch.equal(own.target[0], begun.target[0])
        assert not torch.equal(own.places, begun.places)
        weights = [next(of.make()[0].parameters()) for of in (own, begun)]
        assert not torch.equal(*weights)
        assert torch.equal(weights[0], next(Run(model, 0, text).make()[0].parameters()))


def test_adapters_begin_anew(text: Path) -> None:
    """There is one pretrained model in a process; a training must know nothing of the one before."""
    again = Run(LORA, 0, text)
    first = hash_of(again.trained())
    assert hash_of(again.trained()) == first
    assert hash_of(Run(LORA, 0, text, 7).trained()) != first


def test_removals_are_of_the_lowest_and_the_highest(text: Path) -> None:
    values = np.random.default_rng(0).normal(size=MLP.examples)
    model = replace(MLP, removed=(0.1,), others=0)
    found = truth.removals(Piece(model, 0, "remove path"), text, values)["change"]
    of = partial(retraining.loss_alone, Run(model, 0, text), removed=True)
    order, whole = np.argsort(values), of(torch.ones(model.examples))
    for side, out in enumerate((order[:4], order[-4:])):
        keep = torch.ones(model.examples)
        keep[torch.from_numpy(out.copy())] = 0
        assert found[0, 0, side] == pytest.approx(of(keep) - whole, abs=1e-5)
