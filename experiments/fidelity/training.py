"""What the study trains: its settings, real text, a small GPT, the optimizers; and part B, a run with its books.

Tensors carry their shape in their name: B examples, T tokens, H heads, D width, V vocabulary.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from experiments.study import fingerprint
from inrun import Attributor, Ledger

Rates = tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Study:
    """Everything that decides the results; times apart, equal settings give equal ones."""

    sources: tuple[str, ...] = ("scripture", "code", "news", "parliament", "tweets")
    characters: int = 150_000  # of each source
    vocabulary: int = 512
    length: int = 32  # tokens of an example
    width: int = 40
    layers: int = 2
    heads: int = 2
    batch: int = 16
    target: int = 4  # held-out examples
    steps: int = 300
    warmup: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)
    # part A: one step's game
    moments: tuple[int, ...] = (1, 20, 150, 300)
    first: tuple[str, ...] = ("adamw", "muon")  # whose very first step is among them: SGD's is a step like any other
    permutations: int = 1000
    schemes: tuple[str, ...] = (
        "sgd-proxy", "past", "first", "second", "path 1", "path 2", "path 4", "gauss 2", "gauss 4", "adaptive",
    )  # fmt: skip
    rates: Rates = (
        ("sgd", (3e-4, 6e-4, 5e-3, 0.1)),
        ("momentum", (3e-4, 6e-4, 5e-3, 0.1)),
        ("adamw", (3e-4, 6e-4, 5e-3)),
        ("muon", (3e-4, 6e-4, 5e-3)),
    )
    # part B: the whole run's books
    books: Rates = (("momentum", (1e-3, 0.05)), ("adamw", (1e-3,)))
    accounts: tuple[str, ...] = ("first", "second", "path 1", "path 2", "path 4", "adaptive", "credit")

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name."""
        return fingerprint(self, but=("seeds", "moments", "first", "rates", "books", "accounts"))


QUICK = Study(
    sources=("scripture",), characters=30_000, vocabulary=300, length=12, width=16, layers=1, heads=2, batch=5,
    target=2, steps=12, warmup=4, seeds=(0,), moments=(1, 12), first=("sgd", "adamw"), permutations=150,
    rates=(("sgd", (0.5,)), ("adamw", (0.02,))), books=(("adamw", (5e-3,)),), accounts=("first", "path 1", "path 2"),
)  # fmt: skip


def write_text(study: Study, path: Path) -> None:
    """Real text as examples of equal length: arrays `train` and `held_out` [examples, T] of token numbers, in a file.

    The tokenizer is trained on this text. One document in ten is held out, and no example crosses documents.
    """
    from inrun.lm.sources import demo_mixture  # slow to import, and needed once
    from inrun.lm.tokens import train_tokenizer

    texts = [document.text for document in demo_mixture(study.characters, names=study.sources)]
    tokenizer = train_tokenizer(texts, study.vocabulary)
    parts: dict[bool, list[list[int]]] = {True: [], False: []}
    for k, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        whole = range(0, len(ids) - study.length + 1, study.length)
        parts[k % 10 == 0].extend(ids[start : start + study.length] for start in whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial.npz")
    np.savez(draft, train=np.array(parts[False]), held_out=np.array(parts[True]))
    draft.replace(path)


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

    def __init__(self, study: Study) -> None:
        super().__init__()
        self.token = nn.Embedding(study.vocabulary, study.width)
        self.position = nn.Embedding(study.length, study.width)
        self.blocks = nn.Sequential(*(Block(study.width, study.heads) for _ in range(study.layers)))
        self.norm = nn.LayerNorm(study.width)
        self.head = nn.Linear(study.width, study.vocabulary, bias=False)
        self.head.weight = self.token.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.55 / math.sqrt(study.width))  # GPT-2's 0.02 at its width of 768

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


def optimizers_of(name: str, model: GPT, rate: float) -> list[Optimizer]:
    """The optimizers of this name; Muon's leaves what is no hidden matrix to AdamW."""
    everything = list(model.parameters())
    if name in ("sgd", "momentum"):
        return [torch.optim.SGD(everything, lr=rate, momentum=0.9 if name == "momentum" else 0.0)]
    if name == "adamw":
        return [torch.optim.AdamW(everything, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)]
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in everything if all(p is not matrix for matrix in hidden)]
    return [
        # the scale that lets Muon use AdamW's rates
        torch.optim.Muon(hidden, lr=rate, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.1),
    ]


class Run:
    """One training run: model, optimizers, the batches in their order, and the held-out batch that is the target."""

    def __init__(
        self, study: Study, text: Path, optimizer: str, rate: float, seed: int, dtype: torch.dtype, warmup: int
    ) -> None:
        torch.manual_seed(seed)
        self.model = GPT(study).to(dtype)
        self.optimizers = optimizers_of(optimizer, self.model, rate)
        self._study, self._rate, self._warmup = study, rate, warmup
        generator = torch.Generator().manual_seed(seed)
        with np.load(text) as arrays:
            self._train = torch.from_numpy(arrays["train"])
            held_out = torch.from_numpy(arrays["held_out"])
        self._order = torch.randperm(len(self._train), generator=generator)
        self.target = held_out[torch.randperm(len(held_out), generator=generator)[: study.target]]

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Step (from 1) and batch, with the step's learning rate set; the optimizers' step is the caller's."""
        size = self._study.batch
        for step in range(1, self._study.steps + 1):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self._rate * min(1.0, step / max(self._warmup, 1))
            places = torch.arange((step - 1) * size, step * size) % len(self._order)
            yield step, self._train[self._order[places]]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def settings_of(scheme: str) -> dict[str, Any]:
    """The arguments of `Attributor` for a scheme by the study's name of it: "path 4", "gauss 2", "adaptive", ..."""
    kind, _, nodes = scheme.partition(" ")
    if kind in ("path", "gauss"):
        return {"scheme": "path", "nodes": int(nodes), "rule": "midpoint" if kind == "path" else "gauss"}
    if kind == "adaptive":
        return {"scheme": "path", "nodes": "adaptive", "tolerance": 0.02, "max_nodes": 9}
    if kind == "credit":
        return {"scheme": "path", "nodes": 1, "momentum": "credit"}
    return {"scheme": kind}


def books(
    study: Study, text: Path, optimizer: str, rate: float, warmup: int, seed: int, scheme: str
) -> dict[str, list[float]]:
    """Part B: a run in float32 with an Attributor that audits every step, as in a user's loop.

    Returns:
        For every step, in nats of target loss: the `drop` that it made, and its accounts `value`, `momentum`, `decay`
        and `unexplained`.
    """
    run = Run(study, text, optimizer, rate, seed, torch.float32, warmup)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger"
        settings = settings_of(scheme) | {"ledger": ledger, "audit_every": 1}
        with Attributor(run.model, run.optimizers, {"held-out": run.target}, loss, **settings) as attributor:
            for step, ids in run.batches():
                with attributor.batch(range((step - 1) * len(ids), step * len(ids))):
                    loss(run.model, ids).backward()  # type: ignore[no-untyped-call]
                run.step()
        steps = Ledger(ledger).steps().sort("step")
    found = {name: steps[name].to_list() for name in ("value", "momentum", "decay", "unexplained")}
    return {"drop": (steps["loss_before"] - steps["loss_after"]).to_list(), **found}
