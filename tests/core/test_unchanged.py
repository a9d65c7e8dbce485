"""Attaching changes nothing: not a bit of the weights, the optimizer's state, the random states, nor of the model."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor
from inrun.kernels import Kernel
from tests.models import CASES, GPT, Case, class_losses, convolutional, hugging_face_gpt2, images, token_losses, tokens


class FrozenStatistics(nn.BatchNorm2d):
    """Batch normalisation that is never in training mode, as fine-tuning recipes have it."""

    def train(self, mode: bool = True) -> "FrozenStatistics":
        super().train(False)
        return self


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        FrozenStatistics(4).train(),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


def recurrent_with_dropout() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)
            self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True)

        def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.lstm(self.embedding(x_BT))[0])
            return logits

    return Model()


DROPOUT = {
    "gpt": Case(lambda: GPT(dropout=0.1), tokens, token_losses),
    "hugging-face-gpt2": Case(lambda: hugging_face_gpt2(dropout=0.1), tokens, token_losses),
    "lstm": Case(recurrent_with_dropout, tokens, token_losses),
    "batch-norm": Case(with_batch_norm, images, class_losses),
    "convolutional": Case(convolutional, images, class_losses),
    "mlp": CASES["mlp"],
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "adamw": lambda p: AdamW(p, lr=1e-2, foreach=False),
}


def train(
    case: Case, build: Callable[[Any], Optimizer], attach: bool, kernel: Kernel = "tangent", steps: int = 20
) -> dict[str, Any]:
    """Clipped, accumulated steps; all that they left behind."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = case.build()
    optimizer = build(model.parameters())
    losses = []
    attributor = None
    if attach:
        target = {"t": case.batch(3, 99)}
        attributor = Attributor(model, optimizer, target, case.loss, nodes=2, kernel=kernel, audit_every=5)
    for step in range(steps):
        for part in range(2):
            with attributor.batch(range(4)) if attributor else nullcontext():
                loss = case.loss(model, case.batch(4, 2 * step + part)) / 2
                loss.backward()
                losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    if attributor:
        attributor.close()
    return {
        "losses": torch.stack(losses),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],  # type: ignore[index]
    }


def equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(equal, x, y))
    return bool(x == y)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", DROPOUT)
def test_training_is_bit_identical(name: str, kind: str) -> None:
    plain = train(DROPOUT[name], OPTIMIZERS[kind], attach=False)
    attached = train(DROPOUT[name], OPTIMIZERS[kind], attach=True)
    for what in plain:
        assert equal(plain[what], attached[what]), what


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", DROPOUT)
def test_forming_gradients_changes_training_by_rounding_alone(name: str) -> None:
    """kernel="perexample" adds up the same terms in another order."""
    plain = train(DROPOUT[name], OPTIMIZERS["sgd"], attach=False, steps=6)
    formed = train(DROPOUT[name], OPTIMIZERS["sgd"], attach=True, kernel="perexample", steps=6)
    assert equal(plain["random"], formed["random"])
    for key, weight in plain["model"].items():
        torch.testing.assert_close(formed["model"][key], weight, rtol=1e-9, atol=1e-11)


def traces(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Every attribute of the modules, parameters and optimizer, and how many entries the containers among them have."""
    found = {}
    for name, thing in [*model.named_modules(), *model.named_parameters(), ("optimizer", optimizer)]:
        for key, value in vars(thing).items():
            found[f"{type(thing).__name__} {name}.{key}"] = len(value) if isinstance(value, dict | list | set) else None
    return found


def test_detach_leaves_nothing_behind() -> None:
    case = CASES["gpt"]
    model = case.build()
    optimizer = AdamW(model.parameters())
    case.loss(model, case.batch(4, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = traces(model, optimizer)
    attributor = Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss)
    assert traces(model, optimizer) != before
    with attributor.batch(range(4)):
        case.loss(model, case.batch(4, 0)).backward()
    optimizer.step()
    attributor.close()
    assert traces(model, optimizer) == before
    case.loss(model, case.batch(4, 0)).backward()
    optimizer.step()  # and it trains on as ever


def test_dropout_is_replayed_in_units_that_are_run_again() -> None:
    """An LSTM with dropout between its layers is valued by forward mode: only the same mask conserves the values."""
    case = DROPOUT["lstm"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss) as attributor:
        for step in range(3):
            with attributor.batch(range(4)):
                case.loss(model, case.batch(4, step)).backward()
            optimizer.step()  # raises ConservationError if the mask was another
            optimizer.zero_grad()
    assert attributor.step == 3
