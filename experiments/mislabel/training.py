"""The images with some wrong labels, the training, and the values of the run itself.

Tensors carry their shape in their name: N training images, B of a batch.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from benchmarks.resnet import ResNet18
from experiments.mislabel.config import IN_RUN, Piece, Study
from experiments.pieces import hash_of
from experiments.results import Array
from experiments.sources import IMAGES, Images
from experiments.values import NORMALISED, by_epoch, totals
from inrun import Attributor, Ledger, replay

Batch = tuple[Tensor, Tensor]  # images [B, 1, 28, 28] and classes [B]
TARGET = "held out"
CLASSES = 10
OTHER = 1000  # what is added to a seed where a model must begin with other weights than the run's


@dataclass(frozen=True)
class Data:
    """A seed's training set with its wrong labels, in the order of its use epoch by epoch, its target and test set."""

    x: Tensor
    y: Tensor
    wrong: Tensor
    target: Batch
    tested: Batch
    orders: Sequence[Tensor]

    def steps(self, batch: int) -> Iterator[tuple[int, Tensor]]:
        """The epoch and the images' places, step by step."""
        for epoch, order in enumerate(self.orders):
            for places in torch.split(order, batch):
                yield epoch, places

    def only(self, kept: Tensor, epochs: int, seed: int) -> "Data":
        """With these images alone, in an order of their own."""
        random = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(kept), generator=random) for _ in range(epochs)]
        return replace(self, x=self.x[kept], y=self.y[kept], wrong=self.wrong[kept], orders=orders)


def data_of(study: Study, source: str, seed: int) -> Data:
    random, sizes = np.random.default_rng(seed), [study.examples, study.target, study.tested]
    images, classes = blobs(study) if source == "blobs" else IMAGES[source]()
    chosen = random.permutation(len(classes))[: sum(sizes)]
    x, target, tested = torch.split(torch.from_numpy(images[chosen]), sizes)
    right, of_target, of_tested = torch.split(torch.from_numpy(classes[chosen]), sizes)
    wrong = torch.zeros(study.examples, dtype=torch.bool)
    wrong[random.choice(study.examples, round(study.wrong * study.examples), replace=False)] = True
    another = torch.from_numpy(random.integers(1, CLASSES, study.examples))
    y = torch.where(wrong, (right + another) % CLASSES, right)
    orders = [torch.from_numpy(random.permutation(study.examples)) for _ in range(study.epochs)]
    return Data(x, y, wrong, (target, of_target), (tested, of_tested), orders)


def blobs(study: Study) -> Images:
    """Made-up images, which need nothing installed."""
    random = np.random.default_rng(0)
    classes = random.integers(CLASSES, size=study.examples + study.target + study.tested)
    centres = random.normal(size=(CLASSES, 1, 28, 28))
    return (centres[classes] + random.normal(size=(len(classes), 1, 28, 28))).astype(np.float32), classes


class Run:
    """A training that can be done again."""

    def __init__(self, study: Study, seed: int, data: Data) -> None:
        self.study, self.seed, self.data = study, seed, data

    def model(self, other: int = 0) -> nn.Module:
        """With the weights that the run begins with, or others."""
        torch.manual_seed(self.seed + OTHER * other)
        return ResNet18("group", classes=CLASSES, width=self.study.width, colours=1, stride=2)

    def optimizer(self, model: nn.Module) -> Adam:
        return Adam(model.parameters(), lr=self.study.rate)

    def targets(self) -> list[Batch]:
        """The target in batches, which take turns."""
        return list(zip(*(torch.split(tensor, self.study.batch) for tensor in self.data.target), strict=True))

    def train(self, model: nn.Module, epochs: int | None = None) -> Iterator[int]:
        """Train plainly; after each epoch, its number."""
        optimizer, at = self.optimizer(model), 0
        for epoch, places in self.data.steps(self.study.batch):
            if epoch != at:
                yield at
                at = epoch
            if epoch == epochs:
                return
            self.step(model, optimizer, places)
        yield at

    def step(self, model: nn.Module, optimizer: Adam, places: Tensor) -> None:
        loss(model, (self.data.x[places], self.data.y[places])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def run_of(study: Study, piece: Piece) -> Run:
    return Run(study, piece.seed, data_of(study, piece.source, piece.seed))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluated(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """The mean loss in nats, and the share that is right."""
    with torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(batch[0], 200)])
    return float(F.cross_entropy(logits, batch[1])), float((logits.argmax(1) == batch[1]).float().mean())


def valued(study: Study, piece: Piece) -> dict[str, Any]:
    """A run with an Attributor, as in a user's loop; for `path` also its replay with a horizon.

    Returns:
        `NAME` [epochs, N], and normalised by step: the sums of every image's values, epoch by epoch; `replay-hH` [N];
        `wrong` [N]; `target` [2], `test` [2], `train` [2]: loss and share right at the end; `drop`: of
        the target's loss, in nats; `weights`: their hash at the end.
    """
    scheme, run = piece.part.removeprefix("in-run "), run_of(study, piece)
    before, found = evaluated(run.model(), run.data.target)[0], dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = train_valued(run, folder, IN_RUN[scheme])
        sizes = (study.examples, study.epochs, study.steps)
        for normalised in (False, True):
            found[scheme + NORMALISED * normalised] = by_epoch(Ledger(folder), TARGET, *sizes, normalised)
        if scheme == "path":
            found[f"replay-h{study.horizon}"], _ = replayed(run, folder, study.horizon)
    ends = {part: np.array(evaluated(model, batch)) for part, batch in
            (("target", run.data.target), ("test", run.data.tested), ("train", (run.data.x, run.data.y)))}  # fmt: skip
    drop = np.array(before - ends["target"][0])
    return found | ends | {"wrong": run.data.wrong.numpy(), "drop": drop, "weights": hash_of(model)}


def train_valued(run: Run, folder: Path, settings: Mapping[str, Any]) -> nn.Module:
    """With an Attributor, as in a user's loop. Returns the model."""
    model, data = run.model(), run.data
    optimizer = run.optimizer(model)
    given: dict[str, Any] = {"kernel": "tangent", "ledger": folder, **settings}
    with Attributor(model, optimizer, {TARGET: run.targets()}, loss, **given) as attributor:
        for _, places in data.steps(run.study.batch):
            batch = (data.x[places], data.y[places])
            with attributor.batch(places, data=batch if "replayable" in settings else None):
                loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return model


def replayed(run: Run, folder: Path, horizon: int | None) -> tuple[Array, float]:
    """Values [N] of a recorded run by its end; and how many times the adjoint's norm grows, at most, going back."""
    model = run.model()
    ledger = replay(
        folder, {TARGET: run.targets()}, loss, model=model, optimizer=run.optimizer(model), horizon=horizon,
        progress=lambda done, steps, now: None,
    )  # fmt: skip
    norms = ledger.steps().sort("step")["adjoint"].to_numpy()
    return totals(ledger, run.study.examples), float(norms.max() / norms[-1])


def too_far(study: Study, piece: Piece) -> dict[str, Any]:
    """`replay`, `replay-hH` [N] with horizons that such a run is too rough for; `growth` [horizons]."""
    run, found, growth = run_of(study, piece), dict[str, Any](), []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "target 'held out': what a small change of the weights does"
        )  # it is `growth`
        train_valued(run, Path(name), IN_RUN["path"])
        for horizon in study.too_far:
            values, grown = replayed(run, Path(name), horizon)
            found["replay" if horizon is None else f"replay-h{horizon}"] = values
            growth.append(grown)
    return found | {"growth": np.array(growth)}


def selected(study: Study, piece: Piece, values: Array | None) -> dict[str, Any]:
    """Training on the images of the highest values, for as many epochs as the run, from other weights.

    Returns:
        `accuracy` [kept], or [1] for all images: the share right of the test images; `loss` the same way; `wrong`: how
        many wrong labels were kept.
    """
    found: dict[str, list[float]] = {"accuracy": [], "loss": [], "wrong": []}
    data = data_of(study, piece.source, piece.seed)
    order = np.arange(study.examples) if values is None else np.argsort(-values, kind="stable")
    for share in study.kept if values is not None else (1.0,):
        kept = torch.from_numpy(np.sort(order[: round(share * study.examples)]))
        run = Run(study, piece.seed, data.only(kept, study.epochs, piece.seed))
        model = run.model(other=study.models)
        for _ in run.train(model):
            pass
        end = evaluated(model, data.tested)
        for name, value in zip(found, (end[1], end[0], float(data.wrong[kept].sum())), strict=True):
            found[name].append(value)
    return {name: np.array(of) for name, of in found.items()}
