"""What studies of small language models share: the model, its optimizer and rate, and its losses.

Tensors carry their shape in their name: B of a batch, T tokens, D features, H heads of d, V of the vocabulary.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from experiments.results import Array


class Sizes(Protocol):
    """What a study says of its model; `length` is the most tokens of an example."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm_1(x_BTD)).view(B, T, 3, self.heads, D // self.heads)
        q_BHTd, k_BHTd, v_BHTd = qkv.permute(2, 0, 3, 1, 4)
        # written out: the fused kernel has no rule for vmap, and none for a double backward
        scores_BHTT = (q_BHTd / math.sqrt(D // self.heads)) @ k_BHTd.transpose(-1, -2)
        future_TT = torch.full((T, T), -math.inf, dtype=x_BTD.dtype, device=x_BTD.device).triu(1)
        attended_BHTd = (scores_BHTT + future_TT).softmax(-1) @ v_BHTd
        x_BTD = x_BTD + self.out(attended_BHTd.transpose(1, 2).reshape(B, T, D))
        up: Tensor = self.up(self.norm_2(x_BTD))
        down: Tensor = self.down(F.gelu(up, approximate="tanh"))
        return x_BTD + down


class GPT(nn.Module):
    """A GPT with a tied head and no biases in its linear layers: tokens [B, T] to logits [B, T, V]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.token = nn.Embedding(sizes.vocabulary, sizes.width)
        self.position = nn.Embedding(sizes.length, sizes.width)
        self.blocks = nn.Sequential(*(Block(sizes.width, sizes.heads) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.head.weight = self.token.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.55 / math.sqrt(sizes.width))  # GPT-2's 0.02 at its width of 768

    def forward(self, ids_BT: Tensor) -> Tensor:
        places_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(ids_BT.shape)
        logits: Tensor = self.head(self.norm(self.blocks(self.token(ids_BT) + self.position(places_BT))))
        return logits


def example_losses(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Every example's mean loss over its tokens, in nats: [B]."""
    logits_BTV = model(ids_BT)[:, :-1]
    return F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none").mean(dim=1)


def mean_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """The mean loss of a batch by its logits, in nats: a scalar."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """The mean loss of a batch, in nats: a scalar."""
    return mean_loss(model(ids_BT), ids_BT)


def model_of(study: Sizes, seed: int) -> GPT:
    """A GPT of the study's sizes."""
    torch.manual_seed(seed)
    return GPT(study)


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
