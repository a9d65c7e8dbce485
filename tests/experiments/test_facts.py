"""The study of planted facts, at its smallest, from text to result."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.facts import report, run, training
from experiments.facts.planted import FACTS
from experiments.results import table_rows
from tests.experiments.quick import carried_out, gone_on

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    ranks, books = table_rows(result["ranks"]), table_rows(result["books"])
    assert len(ranks) == 5 * 2 * 5  # methods, facts, and a fact's planted examples and lures
    assert all(1 <= row["rank"] <= training.QUICK.examples for row in ranks)
    found = {(row["method"], row["fact"], row["sentence"]): row["rank"] for row in ranks if row["kind"] == "planted"}
    assert all(found["BM25", fact.name, n] <= 5 for fact in FACTS[:2] for n in range(3))  # its words are in no other
    assert found["path", "Orvasse", 0] != found["training loss", "Orvasse", 0]
    for book in books:
        total = sum(book[name] for name in ("planted", "lures", "others"))
        if book["scheme"] == "path, credit":  # all of the drop is somebody's
            assert total == pytest.approx(book["drop"], rel=0.2)
    left_out = {(row["fact"], row["without"]): row["lost"] for row in table_rows(result["again"])}
    assert len(left_out) == 2 * 2
    assert all(nats != 0 for nats in left_out.values())
    assert "| path | " in page

    written = (tmp_path / "out" / "result.json").read_text("utf-8")
    gone_on(run, tmp_path, "first-seed0.npz")
    assert (tmp_path / "out" / "result.json").read_text("utf-8") == written


def test_the_loss_is_of_the_answer_alone() -> None:
    tokenizer = training.tokenizer_of(training.QUICK)
    target = training.targets_of(training.QUICK, tokenizer)["Orvasse"]
    (ids,) = tokenizer([f" {FACTS[0].answer}."])["input_ids"]
    assert target["labels"][target["labels"] >= 0].tolist() == ids
    assert target["input_ids"][0, -len(ids) :].tolist() == ids


def test_no_sentence_gives_a_question_away() -> None:
    """The question's wording is in no planted sentence, every answer is in all of its own, and in no lure."""
    for fact in FACTS:
        for other in FACTS:
            for sentence in (*other.planted, *other.lures):
                assert (fact.answer.lower().removeprefix("the ") in sentence.lower()) == (sentence in fact.planted)
        assert not any(fact.question.rstrip("?").lower() in sentence.lower() for sentence in fact.planted)


def test_ranks() -> None:
    scores = np.array([0.3, 0.9, 0.1, 0.9])
    assert [report.rank(scores, i) for i in range(4)] == [3, 2, 4, 2]
    random = np.random.default_rng(0)
    scores, planted = random.normal(size=50), [4, 9, 30]
    above = [scores[i] > scores[k] for i in planted for k in range(50) if k not in planted]
    assert report._auroc(50, [report.rank(scores, i) for i in planted]) == pytest.approx(np.mean(above))


def test_bm25() -> None:
    """A rarer word counts for more, a second occurrence for less than the first, a longer text for less."""
    texts = ["a cat", "a dog", "a cat and a dog that is as old as the cat", "a cat cat", "the end of it"]
    cat, dog = training.bm25("cat", texts), training.bm25("Dog", texts)
    assert cat[1] == cat[4] == 0
    assert dog[1] > cat[0] > cat[2] > 0
    assert cat[0] < cat[3] < 2 * cat[0]
    np.testing.assert_allclose(training.bm25("cat, dog!", texts), cat + dog)
    assert cat[0] == pytest.approx(_okapi(1, 2, texts, 3))


def _okapi(often: int, length: int, texts: list[str], having: int) -> Any:
    mean = np.mean([len(text.split()) for text in texts])
    weight = np.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
    return weight * often * 2.5 / (often + 1.5 * (0.25 + 0.75 * length / mean))
