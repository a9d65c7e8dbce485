"""Trainers of every kind: subclasses, streams, samplers, evaluation on the way, early stopping; and what they log."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, IterableDataset
from transformers import EarlyStoppingCallback, Trainer

from inrun import InrunError, Ledger
from inrun.integrations.transformers import attach
from inrun.lm.tokens import Collate
from tests.integrations.trainers import Texts, losses, same_weights, trainer_of

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Stream(IterableDataset[dict[str, Any]]):
    def __init__(self, n: int) -> None:
        self.rows = Texts(n).rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class OwnStep(Trainer):
    """A training step of its own around another, and a loss of its own that logs."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert "id" not in inputs
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        logits, labels = outputs.logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        self.log({"smooth": float(loss.detach())})
        return (loss, outputs) if return_outputs else loss


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> DataLoader[Any]:
        assert isinstance(self.train_dataset, Texts)
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)


class OwnCollate(Trainer):
    """Its batches have the ids already."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        assert isinstance(self.train_dataset, Texts)
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=Collate(pad=0))


class NoIds(Trainer):
    def get_train_dataloader(self) -> DataLoader[Any]:
        def collate(rows: Any) -> Any:
            return Collate(pad=0)([{"input_ids": row["input_ids"]} for row in rows])

        assert isinstance(self.train_dataset, Texts)
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=collate)


class Evaluates(Trainer):
    """Evaluates and predicts between two steps."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            self.predict(Texts(3, seed=5))
            self.evaluate(Texts(3, seed=5))
        return super().training_step(*args, **kwargs)


def arrow(n: int) -> Dataset:
    rows = [{**row, "input_ids": row["input_ids"].tolist(), "length": len(row["input_ids"])} for row in Texts(n).rows]
    return Dataset.from_list(rows)


EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
KINDS: dict[str, tuple[type[Trainer], Any, dict[str, Any]]] = {
    "own step and loss": (OwnStep, Texts(20), {}),
    "own loader": (OwnLoader, Texts(20), {}),
    "own collate": (OwnCollate, Texts(20), {}),
    "evaluates on the way": (Evaluates, Texts(20), {}),
    "a stream": (Trainer, Stream(48), {}),
    "a stream of datasets": (Trainer, arrow(48).to_iterable_dataset(), {}),
    "datasets by length": (Trainer, arrow(20), {"train_sampling_strategy": "group_by_length"}),
    "rebalanced": (Trainer, arrow(20), {"train_sampling_strategy": "batch_rebalance"}),
    "with workers": (Trainer, Texts(20), {"dataloader_num_workers": 1}),
    "all columns": (Trainer, Texts(20), {"remove_unused_columns": False}),
    "the best at the end": (Trainer, Texts(20), EVALUATED | {"load_best_model_at_end": True}),
    "bfloat16": (Trainer, Texts(20), {"bf16": True, "use_cpu": True}),
}


def fed(trainer: Trainer, data: Any) -> dict[int, list[str]]:
    """Which texts each step is given, by their tokens; filled as it trains."""
    names = {tuple(map(int, row["input_ids"])): row["id"] for row in data}
    found: dict[int, list[str]] = defaultdict(list)
    inner = trainer.training_step

    def step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        found[trainer.state.global_step + 1] += [names[tuple(row[real].tolist())] for row, real in rows]
        inputs.pop("id", None)  # of a loader that keeps them
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = step  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_training_is_what_it_was_and_the_ledger_holds_what_was_fed(name: str, tmp_path: Path) -> None:
    kind, data, arguments = KINDS[name]

    def made(folder: str) -> Trainer:
        trainer = trainer_of(tmp_path / folder, data, kind, **arguments)
        if name == "the best at the end":
            trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9))
        return trainer

    plain = made("plain")
    given = fed(plain, data)
    plain.train()
    trainer = made("attached")
    attach(trainer, {"t": Texts(4, seed=8)}, ledger=tmp_path / "run", kernel="tangent")
    trainer.train()
    assert losses(trainer) == losses(plain)
    same_weights(trainer, plain)
    booked = Ledger(tmp_path / "run").scan().collect()
    assert trainer.state.global_step == (4 if name == "the best at the end" else 6)
    assert {step: sorted(ids) for step, ids in given.items()} == {
        step: sorted(booked.filter(pl.col("step") == step)["id"]) for step in booked["step"].unique()
    }


def test_a_loader_without_ids_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Texts(20), NoIds)
    callback = attach(trainer, {"t": Texts(4, seed=8)})
    with pytest.raises(InrunError, match=r"without 'id'.*collate_fn return the ids"):
        trainer.train()
    callback.detach()
    assert "training_step" not in vars(trainer)
    trainer.pop_callback(callback)
    trainer.train()


def test_one_attach_is_for_one_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Texts(20), max_steps=1)
    first = attach(trainer, {"t": Texts(4, seed=8)})
    with pytest.raises(InrunError, match="attached already"):
        attach(trainer, {"t": Texts(4, seed=8)})
    trainer.train()
    with pytest.raises(InrunError, match="values one run"):
        trainer.train()
    second = attach(trainer, {"t": Texts(4, seed=8)})
    assert first not in trainer.callback_handler.callbacks
    trainer.train()
    assert second.attributor is not None
    assert second.attributor.step == 1
    with pytest.raises(InrunError, match="auto_find_batch_size"):
        attach(trainer_of(tmp_path, Texts(20), auto_find_batch_size=True), {"t": Texts(4, seed=8)})


def test_a_run_that_broke_off_goes_on_in_the_same_trainer(tmp_path: Path) -> None:
    class Breaks(Trainer):
        broken = False

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 4 and not self.broken:
                self.broken = True
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path / "a", Texts(20))
    attach(whole, {"t": Texts(4, seed=8)}, ledger=tmp_path / "whole", kernel="tangent")
    whole.train()
    trainer = trainer_of(tmp_path / "b", Texts(20), Breaks, **settings)
    attach(trainer, {"t": Texts(4, seed=8)}, ledger=tmp_path / "broken", kernel="tangent")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    mine, its = (Ledger(tmp_path / name).scan().collect().sort("step", "id") for name in ("broken", "whole"))
    assert mine.equals(its)


@pytest.mark.parametrize("momentum", ["account", "credit"])
def test_the_books_are_logged(momentum: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums since the last log, in log_history and in TensorBoard; evaluation's logs and the totals have none."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_of(
        tmp_path / "out", Texts(40), max_steps=32, logging_steps=16, eval_strategy="steps", eval_steps=16,
        report_to=["tensorboard"], adam_beta1=0.1,
    )  # fmt: skip
    targets = {name: Texts(4, seed=seed) for name, seed in (("a", 8), ("b", 9))}
    attach(trainer, targets, ledger=tmp_path / "run", audit_every=2, momentum=momentum)
    trainer.train()
    trained = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in trained] == [16, 32]
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert len(others) == 3
    assert not any(name.startswith("inrun/") for entry in others for name in entry)
    ledger = Ledger(tmp_path / "run")
    for target in targets:
        rows = ledger.steps(target).sort("step")
        for entry, part in zip(trained, (rows[:16], rows[16:]), strict=True):
            if momentum == "account":
                for name in ("value", "unexplained", "momentum", "decay"):
                    assert entry[f"inrun/{target}/{name}"] == pytest.approx(part[name].sum(), rel=1e-9)
                assert entry[f"inrun/{target}/loss"] == part["loss"][-1]
        logged = sum(entry.get(f"inrun/{target}/value", 0.0) for entry in trained)
        # under credit the first 16 steps are final together, some steps later, and the others when training ends
        final = rows if momentum == "account" else rows[:16]
        assert logged == pytest.approx(final["value"].sum(), rel=1e-9)
    assert 0 < max(entry.get("inrun/conservation", 0.0) for entry in trained) < 1e-4
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("value", "loss", "unexplained", "momentum", "decay"):
        events = board.Scalars(f"train/inrun/b/{name}")
        shown = [entry for entry in trained if f"inrun/b/{name}" in entry]
        assert [event.step for event in events] == [entry["step"] for entry in shown]
        assert [event.value for event in events] == pytest.approx([entry[f"inrun/b/{name}"] for entry in shown])
    assert board.Scalars("train/inrun/conservation")
