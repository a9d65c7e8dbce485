"""Runs of Hugging Face's Trainer and of Lightning's that torchrun starts on several processes, or one alone.

    torchrun --nproc-per-node 2 -m tests.parallel.trainers KIND FOLDER [CHECKPOINT]

FOLDER/LEDGER is the ledger, FOLDER/checkpoints what the trainer writes. All runs have batches of 8 examples a step.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from inrun.integrations.lightning import InrunCallback
from inrun.integrations.transformers import attach
from tests.integrations.trainers import Texts, trainer_of, without_dropout
from tests.models import CASES

LEDGER, STEPS, KEPT = "values", 6, 3


def hugging_face(folder: Path, checkpoint: str | None) -> None:
    several = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = trainer_of(
        folder / "checkpoints", Texts(24), max_steps=STEPS, save_strategy="steps", save_steps=KEPT,
        per_device_train_batch_size=4, gradient_accumulation_steps=2 // several, use_cpu=True,
        learning_rate=3e-3, adam_epsilon=1e-2, warmup_steps=0, lr_scheduler_type="constant",
        ddp_backend="gloo" if several > 1 else None,
    )  # fmt: skip
    without_dropout(trainer.model)
    attach(trainer, {"t": Texts(7, seed=8)}, ledger=folder / LEDGER, audit_every=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    logged = [entry["inrun/t/value"] for entry in trainer.state.log_history if "inrun/t/value" in entry]
    if trainer.is_world_process_zero():
        (folder / "logged.txt").write_text("\n".join(map(str, logged)))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = CASES["gpt"].build()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return CASES["gpt"].loss(self.model, batch["tokens"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, eps=1e-2)


def on_lightning(folder: Path, checkpoint: str | None) -> None:
    several = int(os.environ.get("WORLD_SIZE", "1"))
    seed_everything(0)
    case = CASES["gpt"]
    rows: Any = [{"tokens": row, "id": k} for k, row in enumerate(case.batch(24, 0))]
    callback = InrunCallback(
        {"t": [case.batch(3, 90), case.batch(3, 91)]}, lambda m, batch: case.loss(m.model, batch),
        ledger=folder / LEDGER, audit_every=2,
    )  # fmt: skip
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=several, logger=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=0.5, accumulate_grad_batches=2,
        strategy=DDPStrategy(process_group_backend="gloo") if several > 1 else "auto", default_root_dir=folder,
        use_distributed_sampler=False,
        callbacks=[callback, ModelCheckpoint(folder / "checkpoints", every_n_train_steps=KEPT, save_top_k=-1)],
    )  # fmt: skip
    sampler: DistributedSampler[Any] = DistributedSampler(
        rows, several, int(os.environ.get("RANK", "0")), shuffle=False
    )
    trainer.fit(Module(), DataLoader(rows, batch_size=4 // several, sampler=sampler), ckpt_path=checkpoint)


def main() -> None:
    kind, folder, *rest = sys.argv[1:]
    place, checkpoint = Path(folder), rest[0] if rest else None
    place.mkdir(parents=True, exist_ok=True)
    {"ddp": hugging_face, "lightning": on_lightning}[kind](place, checkpoint)


if __name__ == "__main__":
    main()
