"""A real Trainer: ids reach the attributor, values are the oracle's, and training is what it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from inrun import Attributor, InrunError, Ledger
from inrun.integrations.transformers import attach, last_checkpoint, model_loss
from inrun.lm.tokens import Collate
from tests.integrations.trainers import Texts, losses, same_weights, trainer_of, without_dropout
from tests.models import hugging_face_gpt2


def test_training_is_bit_identical_and_every_example_is_valued(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path / "plain", Texts(20), eval_strategy="steps", eval_steps=2)
    plain.train()
    trainer = trainer_of(tmp_path / "attached", Texts(20), eval_strategy="steps", eval_steps=2)
    attach(
        trainer,
        {"dataset": Texts(7, seed=8), "batch": Collate(pad=0)(Texts(3, seed=7, ids=False).rows)},
        ledger=tmp_path / "run",
        kernel="tangent",
    )
    trainer.train()
    assert losses(trainer) == losses(plain)
    same_weights(trainer, plain)
    assert set(vars(trainer)) == set(vars(plain))
    ledger = Ledger(tmp_path / "run")
    assert ledger.run["targets"].keys() == {"dataset", "batch"}
    assert ledger.run["targets"]["dataset"] == {"batches": 3}
    values = ledger.values("dataset")
    assert sorted(values["id"]) == sorted(f"text-{k}" for k in range(20))
    # six steps of eight examples, the last of each pass of four only, are two passes
    assert values["count"].to_list() == [2] * 20
    steps = ledger.steps("batch")
    assert steps["train_loss"].to_list() == pytest.approx(losses(plain), rel=1e-4)


def test_a_trainers_values_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    """The same model, batches and optimizer by hand: the same values, to the last bit that float32 has."""
    seen: list[tuple[list[str], dict[str, torch.Tensor]]] = []

    class Spy(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            assert callback.attributor is not None
            assert callback.attributor.last is not None
            seen.append((list(map(str, callback.attributor.last.ids)), callback.attributor.last.values))

    target = Collate(pad=0)(Texts(3, seed=7, ids=False).rows)
    data = Texts(12)
    trainer = trainer_of(
        tmp_path,
        data,
        gradient_accumulation_steps=1,
        max_steps=3,
        warmup_steps=0,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        optim="sgd",
        learning_rate=0.1,
    )
    trainer.model = without_dropout(trainer.model)
    callback = attach(trainer, {"t": target})
    trainer.add_callback(Spy())
    trainer.train()

    torch.manual_seed(0)
    model = without_dropout(hugging_face_gpt2(dropout=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = {row["id"]: row for row in data.rows}
    with Attributor(model, optimizer, {"t": target}, model_loss) as attributor:
        for ids, values in seen:
            batch = Collate(pad=0)([{"input_ids": rows[i]["input_ids"]} for i in ids])
            with attributor.batch(ids):
                model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            assert attributor.last is not None
            torch.testing.assert_close(attributor.last.values["t"], values["t"], rtol=1e-4, atol=1e-8)


def test_packed_documents_have_an_id_for_every_token(tmp_path: Path) -> None:
    """As lists and as tensors; two documents in every example, one of which is in the next example, too."""
    data = Texts(8, ids=False)
    for k, row in enumerate(data.rows):
        row["input_ids"] = torch.cat([row["input_ids"], row["input_ids"]])[:8]
        ids = [k] * 3 + [k + 1] * 5
        row["id"] = torch.tensor(ids) if k % 2 else ids
    trainer = trainer_of(tmp_path / "trainer", data, max_steps=2)
    attach(trainer, {"t": Texts(3, seed=7, ids=False)}, ledger=tmp_path / "run")
    trainer.train()
    ledger = Ledger(tmp_path / "run")
    values = ledger.values("t")
    assert sorted(values["id"]) == list(range(9))
    assert values["value"].sum() == pytest.approx(ledger.steps("t")["value"].sum(), rel=1e-9)


def test_a_resumed_trainer_has_the_same_ledger(tmp_path: Path) -> None:
    target = Collate(pad=0)(Texts(3, seed=7, ids=False).rows)
    whole = trainer_of(tmp_path / "a", Texts(20))
    attach(whole, {"t": [target, target]}, ledger=tmp_path / "whole")
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    first = trainer_of(tmp_path / "b", Texts(20), save_strategy="steps", save_steps=2)
    attach(first, {"t": [target, target]}, ledger=tmp_path / "resumed")
    first.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer_of(tmp_path / "b", Texts(20), save_strategy="steps", save_steps=2)
    attach(second, {"t": [target, target]}, ledger=tmp_path / "resumed")
    checkpoint = last_checkpoint(tmp_path / "b")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    second.train(resume_from_checkpoint=str(checkpoint))
    for table in ("scan", "steps"):
        mine, its = (getattr(Ledger(tmp_path / run), table)().lazy().collect() for run in ("resumed", "whole"))
        assert mine.sort("step", *(["id"] if "id" in mine.columns else [])).equals(
            its.sort("step", *(["id"] if "id" in its.columns else []))
        )


def test_an_example_without_an_id_is_refused(tmp_path: Path) -> None:
    target: Mapping[str, Any] = Collate(pad=0)(Texts(3, ids=False).rows)
    trainer = trainer_of(tmp_path, Texts(20, ids=False))
    attach(trainer, {"t": target})
    with pytest.raises(InrunError, match=r"no 'id' column \(it has input_ids\).*id_column="):
        trainer.train()


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, whole in ((90, True), (100, True), (110, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "inrun.json").write_text("{}")
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-100"


def test_a_resumed_trainer_goes_on_paying_credit(tmp_path: Path) -> None:
    """The contributions whose momentum lives are in the checkpoint: the ledger is that of an uninterrupted run."""

    def attached(folder: Path, run: Path, **arguments: Any) -> Trainer:
        trainer = trainer_of(folder, Texts(20), max_steps=20, adam_beta1=0.5, lr_scheduler_type="constant", **arguments)
        attach(trainer, {"t": Texts(4, seed=8)}, ledger=run, momentum="credit", audit_every=5)
        return trainer

    attached(tmp_path / "whole", tmp_path / "run-whole").train()
    attached(tmp_path / "part", tmp_path / "run", save_strategy="steps", save_steps=17).train()
    attached(tmp_path / "part", tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-17"))
    whole, resumed = Ledger(tmp_path / "run-whole"), Ledger(tmp_path / "run")
    assert resumed.scan().collect().equals(whole.scan().collect())
    assert resumed.steps("t").equals(whole.steps("t"))
    assert whole.scan().collect()["step"].n_unique() == 20
