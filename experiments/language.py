"""What studies of small language models share: the model, its optimizer and rate, and its losses.

Tensors carry their shape in their name: B of a batch, T tokens.
"""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.fidelity.training import GPT, example_losses, loss
from experiments.fidelity.training import Study as Model
from experiments.results import Array


def model_of(study: Any, seed: int) -> GPT:
    """A GPT of the study's sizes."""
    settings = {name: getattr(study, name) for name in ("vocabulary", "length", "width", "layers", "heads")}
    torch.manual_seed(seed)
    return GPT(Model(**settings))


def optimizer_of(study: Any, model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=study.rate, betas=(0.9, 0.95), weight_decay=0.1)


def set_rate(study: Any, optimizer: Optimizer, step: int) -> float:
    """Of a step, counted from 0: linear warm-up, then half a cosine to a tenth."""
    done = (step - study.warmup) / max(study.steps - study.warmup, 1)
    share = (step + 1) / study.warmup if step < study.warmup else 0.55 + 0.45 * math.cos(math.pi * done)
    for group in optimizer.param_groups:
        group["lr"] = study.rate * share
    return float(study.rate * share)


def train_step(model: nn.Module, optimizer: Optimizer, blocks_BT: Tensor) -> None:
    loss(model, blocks_BT).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def losses_of(model: nn.Module, blocks_BT: Tensor) -> Array:
    """The loss of every block, the mean of its tokens, in nats: [B]."""
    with torch.no_grad():
        parts = [example_losses(model, part).double() for part in torch.split(blocks_BT, 64)]
    return np.asarray(torch.cat(parts).numpy())


def mean_loss_of(model: nn.Module, blocks_BT: Tensor) -> float:
    return float(losses_of(model, blocks_BT).mean())


def hash_of(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
