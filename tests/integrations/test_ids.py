"""Ids beside a collator's batch: as it lays out the tokens, or an error where that cannot be told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from inrun import InrunError
from inrun.integrations.ids import CollateWithIds
from inrun.integrations.transformers import attach
from inrun.lm.tokens import Collate
from tests.integrations.trainers import Texts, trainer_of, without_dropout

ROWS: list[dict[str, Any]] = [{"input_ids": [5, 6, 7], "id": "a"}, {"input_ids": [8, 9], "id": "b"}]
BY_TOKEN = [{**ROWS[0], "id": ["a", "b", "b"]}, {**ROWS[1], "id": ["b", "c"]}]
FLAT: Any = DataCollatorWithFlattening()


def left(rows: Any) -> dict[str, Any]:
    batch: dict[str, Any] = {name: x.flip(1) for name, x in Collate(pad=0)(rows).items()}
    return batch


def bare(rows: Any) -> dict[str, Any]:
    return {"input_ids": Collate(pad=0)(rows)["input_ids"]}


def backwards(rows: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[i for row in reversed(rows) for i in row["input_ids"]]])}


@pytest.mark.parametrize(
    ("collate", "rows", "expected"),
    [
        (Collate(pad=0), ROWS, ["a", "b"]),
        (Collate(pad=0), ROWS[:1], ["a"]),
        (bare, ROWS, ["a", "b"]),
        (Collate(pad=0), BY_TOKEN, [["a", "b", "b"], ["b", "c", None]]),
        (left, BY_TOKEN, [["a", "b", "b"], [None, "b", "c"]]),
        (FLAT, ROWS, [["a", "a", "a", "b", "b"]]),
        (FLAT, BY_TOKEN, [["a", "b", "b", "b", "c"]]),
        (FLAT, BY_TOKEN[:1], [["a", "b", "b"]]),
    ],
)
def test_ids_stand_as_the_tokens_do(collate: Any, rows: Any, expected: list[Any]) -> None:
    assert CollateWithIds(collate, "id")(rows)["id"] == expected
    tensors = [{"input_ids": torch.tensor(row["input_ids"]), "id": row["id"]} for row in rows]
    if collate is not FLAT:
        assert CollateWithIds(collate, "id")(tensors)["id"] == expected


@pytest.mark.parametrize(
    ("collate", "rows", "message"),
    [
        (bare, BY_TOKEN, "list of 2 ids.*row of 3 tokens of it, with no attention_mask"),
        (Collate(pad=0), [BY_TOKEN[0], {**ROWS[1], "id": ["b"]}], "list of 1 ids.*attention_mask with 2 of them"),
        (Collate(pad=0), [BY_TOKEN[0], ROWS[1]], "some examples of a batch have a list of ids and some have one"),
        (FLAT, [BY_TOKEN[0], {**ROWS[1], "id": ["b"]}], "2 tokens has a list of 1 ids"),
        (backwards, ROWS, "one row of 5 tokens of 2 examples, and not by putting"),
        (lambda rows: (rows,), ROWS, "makes a tuple of a batch"),
    ],
)
def test_what_cannot_be_told_is_refused(collate: Any, rows: Any, message: str) -> None:
    with pytest.raises(InrunError, match=message):
        CollateWithIds(collate, "id")(rows)


def test_flattened_examples_have_the_values_of_padded_ones(tmp_path: Path) -> None:
    """With transformers' own collator, in a plain Trainer."""
    found = []
    for folder, collate in (("padded", Collate(pad=0)), ("flat", FLAT)):
        trainer = trainer_of(tmp_path / folder, Texts(20), max_steps=1, optim="sgd", warmup_steps=0)
        trainer.model, trainer.data_collator = without_dropout(trainer.model), collate
        target = Collate(pad=0)(Texts(3, seed=7, ids=False).rows)
        callback = attach(trainer, {"t": target})
        trainer.train()
        assert callback.attributor is not None
        found.append(callback.attributor.last)
    padded, flat = found
    assert padded is not None
    assert flat is not None
    assert flat.ids == padded.ids
    torch.testing.assert_close(flat.values["t"], padded.values["t"], rtol=1e-4, atol=1e-9)
