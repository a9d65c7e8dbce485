"""What the study trains: its settings, real text, a small GPT, the optimizers; and part B, a run with its books.

Tensors carry their shape in their name: B examples, T tokens, H heads, D width, V vocabulary.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.language import GPT, loss
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
