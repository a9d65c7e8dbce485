"""Small Trainers of GPT-2 for the tests."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from inrun.lm.tokens import Collate
from tests.models import VOCABULARY, hugging_face_gpt2


class Texts(Dataset[dict[str, Any]]):
    """Examples of uneven lengths, with ids, and a column that the model does not take."""

    def __init__(self, n: int, seed: int = 0, ids: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows: list[dict[str, Any]] = [
            {"input_ids": torch.randint(0, VOCABULARY, (5 + k % 4,), generator=generator), "note": "more"}
            for k in range(n)
        ]
        if ids:
            for k, row in enumerate(self.rows):
                row["id"] = f"text-{k}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self.rows[k]


def trainer_of(folder: Path, data: Any, kind: type[Trainer] = Trainer, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "warmup_steps": 2, "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "report_to": [], "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    return kind(
        model=hugging_face_gpt2(dropout=0.1),
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=data,
        eval_dataset=Texts(5, seed=9),
        data_collator=Collate(pad=0),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_weights(one: Trainer, other: Trainer) -> None:
    """Bit for bit."""
    assert one.model is not None
    assert other.model is not None
    for (name, p), q in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def without_dropout(model: Any) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert isinstance(model, PreTrainedModel)
    return model
