"""A real Trainer's run, repeated bit for bit and gone back through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from inrun import Ledger, Recording, RecordingError
from inrun.integrations.transformers import attach, replay
from tests.integrations.trainers import Texts, trainer_of


class Weighted(Trainer):
    """One use of an example, by its step and its place there, has another weight."""

    weighted: tuple[int, int, float] | None = None
    _seen = (-1, 0)  # the step, and how many of its examples went before

    def compute_loss(self, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
        labels = inputs["labels"][:, 1:]
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)
        step, before = self._seen if self._seen[0] == self.state.global_step else (self.state.global_step, 0)
        self._seen = step, before + len(losses)
        if self.weighted is not None and self.weighted[0] == step + 1:
            weights = torch.ones_like(losses)
            at = self.weighted[1] - before
            if 0 <= at < len(losses):
                weights[at] = self.weighted[2]
            losses = losses * weights
        return losses.sum() / num_items_in_batch


def trained(folder: Path, **arguments: Any) -> Trainer:
    trainer = trainer_of(folder, Texts(20), **arguments)
    attach(trainer, {"t": Texts(7, seed=8)}, ledger=folder / "run", replayable=Recording(every=4))
    trainer.train()
    return trainer


def exact_loss(model: Any, batch: Any) -> Tensor:
    """The mean over the batch's tokens, which the model's own loss takes in float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:])


def end_of(trainer: Trainer) -> float:
    """The target's loss, the mean over its batches."""
    assert trainer.model is not None
    trainer.model.eval()
    losses: list[Tensor] = []
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(Texts(7, seed=8, ids=False)):
            losses.append(exact_loss(trainer.model, batch))
    return float(torch.stack(losses).mean())


@pytest.mark.usefixtures("float64")
def test_a_use_is_worth_what_a_training_without_a_part_of_it_loses(tmp_path: Path) -> None:
    """Dropout, clipping, accumulation, warm-up, decay and a loss of its own, as the Trainer does them."""
    trained(tmp_path, kind=Weighted)
    trainer = trainer_of(tmp_path, Texts(20), Weighted)
    ledger = replay(trainer, tmp_path / "run", {"t": Texts(7, seed=8)}, loss=exact_loss)
    found = ledger.scan().collect()  # in the order of the batches
    assert found.height == 40
    largest = found.with_row_index().sort(found["value"].abs()).tail(2)
    for row, step, value in largest.select("index", "step", "value").iter_rows():
        first = found["step"].search_sorted(step)
        ends = []
        for weight in (1 + 1e-4, 1 - 1e-4):
            trainer = trainer_of(tmp_path / "again", Texts(20), Weighted)
            assert isinstance(trainer, Weighted)
            trainer.weighted = step, row - int(first), weight
            trainer.train()
            ends.append(end_of(trainer))
        assert (ends[1] - ends[0]) / 2e-4 == pytest.approx(value, rel=1e-4)


def test_bfloat16_is_repeated_bit_for_bit_and_another_trainer_is_refused(tmp_path: Path) -> None:
    cast: dict[str, Any] = {"bf16": True, "use_cpu": True}
    trained(tmp_path, **cast)
    trainer = trainer_of(tmp_path, Texts(20), **cast)
    ledger = replay(trainer, tmp_path / "run", {"later": Texts(3, seed=2)})
    assert ledger.values("later")["count"].sum() == 40
    assert Ledger(tmp_path / "run").schemes == ["replay"]
    with pytest.raises(RecordingError, match="repeating step 5 leads to other weights"):
        replay(trainer_of(tmp_path, Texts(20)), tmp_path / "run", {"other": Texts(3, seed=3)})
