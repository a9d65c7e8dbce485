"""Small LightningModules and Trainers for the tests."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

_GENERATOR = torch.Generator().manual_seed(5)
X, Y = torch.randn(20, 4, generator=_GENERATOR), torch.randint(3, (20,), generator=_GENERATOR)
EXAMPLES = [{"x": X[k], "y": Y[k], "id": f"row-{k}"} for k in range(20)]
TARGET = {"x": X[:5] + 0.1, "y": Y[:5]}


class Lit(LightningModule):
    """A classifier whose training_step calls its one child."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch)
        loss = cross_entropy(self.model(batch["x"]), batch["y"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch["x"]), batch["y"]), batch_size=4)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Parts(Lit):
    """Parameters in several children, and in the module itself; training_step calls self(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.model(x)
        logits: Tensor = self.head(h) * self.scale(h)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": cross_entropy(self(batch["x"]), batch["y"])}


class FrozenPart(Lit):
    """A frozen part with dropout and statistics before what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.before(x))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return cross_entropy(self.model(self.before(batch["x"])), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)


class FrozenInOptimizer(FrozenPart):
    """The same, whose optimizer is given all parameters, and whose training_step calls self(x)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return cross_entropy(self(batch["x"]), batch["y"])

    configure_optimizers = Lit.configure_optimizers


def loss(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module(batch["x"]), batch["y"])


def loader(shuffle: bool = False, examples: Any = EXAMPLES) -> DataLoader[Any]:
    return DataLoader(examples, batch_size=4, shuffle=shuffle)


def trainer_of(*callbacks: Callback, **settings: Any) -> Trainer:
    plain: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **(plain | settings))
