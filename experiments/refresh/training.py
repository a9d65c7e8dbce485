"""What the study trains: its settings, real text with its sources, and a run whose every value is kept."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.fidelity.training import optimizers_of
from experiments.language import loss, model_of
from experiments.pieces import hash_of
from experiments.study import fingerprint
from inrun import Attributor, Ledger

Scheme = Literal["path", "first"]
MIXED = "mixed"  # a target from all sources; others are from the source that they are named after
OTHER = "other"  # its counterpart of as many other sequences


@dataclass(frozen=True)
class Rotation:
    """Where a target's batches rotate: the runs, and which target."""

    optimizer: str
    rate: float
    scheme: Scheme
    target: str


@dataclass(frozen=True)
class Study:
    """Everything that decides the results: equal settings give equal ones."""

    sources: tuple[str, ...] = ("scripture", "code", "news", "parliament", "tweets")
    characters: int = 60_000  # of each source
    vocabulary: int = 512
    length: int = 32  # tokens of an example
    width: int = 40
    layers: int = 2
    heads: int = 2
    examples: int = 128  # of each source, in the training set
    epochs: int = 4
    batch: int = 16
    target: int = 16  # held-out sequences
    warmup: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[tuple[str, float], ...] = (("sgd", 0.1), ("sgd", 0.3), ("adamw", 1e-3), ("adamw", 5e-3))
    refresh: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rotations: tuple[Rotation, ...] = (
        Rotation("sgd", 0.1, "first", MIXED),
        Rotation("adamw", 1e-3, "path", MIXED),
        Rotation("adamw", 1e-3, "path", "code"),
    )
    sizes: tuple[int, ...] = (8, 4, 2, 1)  # sequences of a rotating batch
    fixed: tuple[int, ...] = (4, 1)  # sequences of a target that is a part of the whole one, and does not rotate
    both: int = 4  # the refresh that is tried with the smallest of them

    @property
    def steps(self) -> int:
        """Of a run: whole epochs."""
        return self.epochs * (len(self.sources) * self.examples // self.batch)

    def whole(self, target: str) -> str:
        """What a target's values are called when all of its sequences are one batch."""
        return f"{target}-{self.target}"

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name."""
        return fingerprint(self, but=("seeds", "rates", "refresh"))


QUICK = Study(
    sources=("scripture", "code"), characters=30_000, vocabulary=300, length=12, width=16, layers=1, examples=20,
    epochs=2, batch=5, target=4, warmup=4, seeds=(0,), rates=(("sgd", 0.1), ("adamw", 5e-3)), refresh=(1, 2, 4),
    rotations=(Rotation("sgd", 0.1, "first", MIXED), Rotation("adamw", 5e-3, "path", "code")), sizes=(2, 1), fixed=(1,),
    both=2,
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One training run with its values: what is computed and stored at a time."""

    optimizer: str
    rate: float
    scheme: Scheme
    refresh: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.rate:g}-{self.scheme}-refresh{self.refresh}-seed{self.seed}"


def pieces_of(study: Study) -> Iterator[Piece]:
    for seed in study.seeds:
        for optimizer, rate in study.rates:
            yield Piece(optimizer, rate, "path", 1, seed)
            for refresh in study.refresh:
                yield Piece(optimizer, rate, "first", refresh, seed)


def write_text(study: Study, path: Path) -> None:
    """Real text as examples of equal length, in a file: `train` and `held_out` [examples, T] of token numbers, and for
    each its source's place in `study.sources`, `train_source` and `held_out_source` [examples].

    The tokenizer is trained on this text. One document in ten is held out, and no example crosses documents.
    """
    from inrun.lm.sources import demo_mixture  # slow to import, and needed once
    from inrun.lm.tokens import train_tokenizer

    documents = list(demo_mixture(study.characters, names=study.sources))
    texts = [document.text for document in documents]
    tokenizer = train_tokenizer(texts, study.vocabulary)
    parts: dict[str, list[list[int]]] = {"train": [], "held_out": []}
    sources: dict[str, list[int]] = {"train": [], "held_out": []}
    for k, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        part = "held_out" if k % 10 == 0 else "train"
        for start in range(0, len(ids) - study.length + 1, study.length):
            parts[part].append(ids[start : start + study.length])
            sources[part].append(study.sources.index(str(documents[k].columns["domain"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial.npz")
    arrays: dict[str, Any] = parts | {f"{part}_source": of for part, of in sources.items()}
    np.savez(draft, **arrays)
    draft.replace(path)


class Data:
    """What a seed decides beside the weights: the training set, its order, and the held-out sequences."""

    def __init__(self, study: Study, text: Path, seed: int) -> None:
        self._study, self._random = study, np.random.default_rng(seed)
        with np.load(text) as arrays:
            train, held_out = arrays["train"], arrays["held_out"]
            of_source, held_out_of = (
                [np.flatnonzero(arrays[f"{part}_source"] == k) for k in range(len(study.sources))]
                for part in ("train", "held_out")
            )
        chosen = np.concatenate([self._random.choice(of, study.examples, replace=False) for of in of_source])
        self._train = torch.from_numpy(train[chosen])
        self.source = np.repeat(np.arange(len(study.sources)), study.examples)
        pools = dict(zip(study.sources, held_out_of, strict=True)) | {MIXED: np.arange(len(held_out))}
        # by target: twice as many sequences as it has
        self.held_out = {
            name: torch.from_numpy(held_out[self._random.choice(pool, 2 * study.target, replace=False)])
            for name, pool in pools.items()
        }

    def batches(self) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """The examples' places in the training set, and their tokens; every epoch in another order."""
        size = self._study.batch
        for _ in range(self._study.epochs):
            order = self._random.permutation(len(self._train))
            for start in range(0, len(order) - size + 1, size):
                places = order[start : start + size]
                yield places, self._train[torch.from_numpy(places)]


def targets_of(study: Study, piece: Piece, data: Data) -> dict[str, list[Tensor]]:
    """A piece's targets as lists of batches, of which every step uses one.

    `mixed-16` is all 16 sequences as one batch, `mixed-4` the same in rotating batches of 4, `mixed-fixed4` the first
    4 of them at every step, `mixed-other` 16 other ones.
    """

    def rotating(target: str, size: int) -> dict[str, list[Tensor]]:
        return {f"{target}-{size}": list(torch.split(data.held_out[target][: study.target], size))}

    found = rotating(MIXED, study.target)
    for one in study.rotations:
        if (piece.optimizer, piece.rate) != (one.optimizer, one.rate):
            continue
        if piece.scheme == one.scheme and piece.refresh == 1:
            for size in (study.target, *study.sizes):
                found |= rotating(one.target, size)
            sequences = data.held_out[one.target]
            found |= {f"{one.target}-fixed{size}": [sequences[:size]] for size in study.fixed}
            found[f"{one.target}-{OTHER}"] = [sequences[study.target :]]
        if piece.scheme == "first" and piece.refresh in (1, study.both):
            found |= rotating(MIXED, min(study.sizes))
    return found


def train(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """A run in float32 with an Attributor, as in a user's loop.

    Returns:
        `places` [steps, B]: which examples each step used; `source` [examples]; `loss` [2]: the mixed target's at the
        first and last gradient; `weights`: a hash of those that the run ends with; and for every target NAME
        `values-NAME` [steps, B] in nats and `taken-NAME` [steps], how many gradients of it the step took.
    """
    model = model_of(study, piece.seed)
    (optimizer,) = optimizers_of(piece.optimizer, model, piece.rate)
    data = Data(study, text, piece.seed)
    targets = targets_of(study, piece, data)
    values: dict[str, list[NDArray[Any]]] = {name: [] for name in targets}
    used = []
    with tempfile.TemporaryDirectory() as folder:
        with Attributor(
            model, optimizer, targets, loss, scheme=piece.scheme, refresh=piece.refresh, kernel="tangent", ledger=folder
        ) as attributor:
            for step, (places, ids) in enumerate(data.batches(), start=1):
                for group in optimizer.param_groups:
                    group["lr"] = piece.rate * min(1.0, step / study.warmup)
                with attributor.batch(places):
                    loss(model, ids).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                used.append(places)
                assert attributor.last is not None
                for name, of in attributor.last.values.items():
                    values[name].append(of.numpy())
        rows = Ledger(folder).steps().sort("step")
    found: dict[str, Any] = {"places": np.array(used), "source": data.source}
    for name, listed in values.items():
        taken = rows.filter(rows["target"] == name)["target_gradients"]
        found |= {f"values-{name}": np.array(listed), f"taken-{name}": taken.to_numpy()}
    losses = rows.filter(rows["target"] == study.whole(MIXED))["loss"].to_numpy()
    return found | {"loss": losses[[0, -1]], "weights": hash_of(model)}
