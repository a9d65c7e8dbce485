"""An existing LightningModule and Trainer, with one callback of inrun.

python examples/lightning_fit.py [--out RUN] [--steps N]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import inrun
from inrun.integrations.lightning import InrunCallback


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.model(batch["x"]), batch["y"])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loss(module: Any, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(module.model(batch["x"]), batch["y"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = x[:, :3].argmax(1)
    wrong = torch.arange(64, 512) % 8 == 0  # every eighth label is made wrong
    labels = torch.where(wrong, (y[64:] + 1) % 3, y[64:])
    ids = [f"{'wrong' if w else 'right'}-{k}" for k, w in enumerate(wrong)]
    data: Any = [{"x": x[64 + k], "y": labels[k], "id": ids[k]} for k in range(len(ids))]

    callback = InrunCallback({"held out": {"x": x[:64], "y": y[:64]}}, loss, ledger=options.out / "values")
    trainer = Trainer(max_steps=options.steps, callbacks=[callback], default_root_dir=options.out, accelerator="cpu")
    trainer.fit(Classifier(), DataLoader(data, batch_size=32, shuffle=True))
    print(inrun.Ledger(options.out / "values").bottom(10))


if __name__ == "__main__":
    main()
