"""The study of rewordings, at its smallest, from text to result."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.paraphrase import report, run, texts, training
from experiments.paraphrase.config import FAR, NEXT, OTHER, QUICK, RUNGS, Study
from experiments.results import table_rows
from tests.experiments.quick import carried_out

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    found = {(row["model"], row["rung"], row["method"], row["among"]): row for row in table_rows(result["found"])}
    for model in QUICK.models:
        for method in ("gradient", "cosine", "influence"):
            assert found[model.name, "kjv", method, "all"]["median"][0] == 1  # the original itself
        assert found[model.name, "kjv", "path, by step", "all"]["auroc"] > 0.9
        assert 0.2 < found[model.name, OTHER, "path, by step", "all"]["auroc"] < 0.8  # nothing to find
    likeness = {row["rung"]: row["jaccard"] for row in table_rows(result["likeness"])}
    assert list(likeness) == list(RUNGS)
    assert 1 == likeness["kjv"] > likeness["asv"] > likeness["bbe"] > likeness[NEXT]
    assert "| path, by step | 1 " in page


def test_originals_have_no_double_and_no_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    texts.write(QUICK, path)
    kjv = texts.read(path)[0]["kjv"]
    number = {text: verse for verse, text in kjv.items()}
    for seed in range(5):
        found = texts.texts_of(QUICK, path, QUICK.models[0], seed)
        assert len(set(found.examples)) == QUICK.models[0].examples
        for k, at in enumerate((*found.originals["kjv"], *found.originals[FAR])):
            original = found.examples[at]
            assert k >= QUICK.originals or found.targets["kjv"][k] == original
            others = [text for text in found.examples if text != original]
            assert min(abs(number[text] - number[original]) for text in others) > QUICK.apart
            assert max(texts.jaccard(original, text) for text in others) < QUICK.alike
    assert Study().fingerprint() != QUICK.fingerprint()


def test_influence_is_what_the_inverse_gives() -> None:
    """Against the damped inverse itself, where there are fewer weights than examples and where there are more."""
    random = np.random.default_rng(0)
    for weights in (5, 30):
        train, targets = random.normal(size=(12, weights)), random.normal(size=(3, weights))
        curvature = train.T @ train / len(train)
        damping = 0.1 * np.trace(train @ train.T) / len(train) ** 2
        wanted = targets @ np.linalg.inv(curvature + damping * np.eye(weights)) @ train.T
        np.testing.assert_allclose(training.influence(train @ train.T, targets @ train.T, 0.1), wanted, rtol=1e-9)


def test_products_of_gradients(tmp_path: Path) -> None:
    """Some weights at a time, against all at once."""
    path = tmp_path / "text.json"
    texts.write(QUICK, path)
    for trained in QUICK.models:
        made = training.run_of(QUICK, trained, texts.texts_of(QUICK, path, trained, 0), 0)
        rows, weights = made.targets[::4], [p for p in made.model.parameters() if p.requires_grad]
        each = [torch.autograd.grad(training.loss(made.model, row), weights) for row in rows]
        flat = torch.stack([torch.cat([g.flatten() for g in of]) for of in each])
        room = 4 * len(rows) * 500  # of 500 weights
        assert len(list(training.groups(weights, 500))) > 2
        np.testing.assert_allclose(training.gram(made.model, rows, room), (flat @ flat.T).numpy(), rtol=1e-4, atol=1e-7)


def test_a_row_has_the_loss_that_it_has_in_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    texts.write(QUICK, path)
    for trained in QUICK.models:
        made = training.run_of(QUICK, trained, texts.texts_of(QUICK, path, trained, 0), 0)
        rows = sorted(made.train, key=lambda row: row["labels"].shape[1])[:: QUICK.models[0].examples // 4]
        each = training.losses(made.model, training.together(rows)).detach()
        alone = torch.stack([training.loss(made.model, row) for row in rows]).detach()
        torch.testing.assert_close(each, alone, rtol=1e-5, atol=1e-5)


def test_ranks() -> None:
    scores = np.array([0.3, 0.9, 0.1, 0.9])
    assert [report.rank(scores, i) for i in range(4)] == [3, 1.5, 4, 1.5]
