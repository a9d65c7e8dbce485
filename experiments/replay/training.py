"""What the study trains: its settings, digits with some wrong labels, and a run with its values by every method.

Tensors carry their shape in their name: N training examples, B of a batch, D features.
"""

import importlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim import Optimizer

from experiments.pieces import hash_of
from experiments.study import fingerprint
from experiments.values import totals
from inrun import Attributor, Ledger, replay

Batch = tuple[Tensor, ...]  # features [B, D] and labels [B]
TARGET = "held out"
CENTRED = "replay, less its batch's mean"
ALL_SETTINGS = tuple((name, decay) for name in ("GELU", "Tanh", "ReLU") for decay in (True, False))
NOT_HASHED = ("seeds", "optimizers", "settings")
FEATURES, CLASSES = 64, 10
VALUED: dict[str, dict[str, Any]] = {  # in the run itself, each in one of its own
    "path": {"replayable": True},
    "path, credit": {"momentum": "credit"},
    "first": {"scheme": "first"},
}
OPTIMIZERS: dict[str, Callable[[Any, float], Optimizer]] = {
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
}


@dataclass(frozen=True)
class Study:
    """Everything that decides the results: equal settings give equal ones."""

    source: str = "digits"  # scikit-learn's; or "blobs", made up, which need nothing installed
    examples: int = 500
    held_out: int = 500  # of the target
    wrong: float = 0.1  # the share of the training examples whose label is another
    hidden: tuple[int, ...] = (64,)
    batch: int = 20
    epochs: int = 8
    warmup: int = 25  # steps: the first epoch
    # activation, of torch.nn, and whether the rate goes to zero after warm-up, as a half cosine, or is constant; all
    # methods are tried in the first of these settings, `reduced` in the others
    settings: tuple[tuple[str, bool], ...] = ALL_SETTINGS
    reduced: tuple[str, ...] = ("replay", "replay-h50", "path")
    optimizers: tuple[tuple[str, float], ...] = (("adamw", 3e-3), ("momentum", 0.05))  # with their learning rates
    seeds: tuple[int, ...] = (0, 1, 2)
    horizons: tuple[int, ...] = (100, 50, 10, 0)
    kept: tuple[float, ...] = (0.5, 0.9)  # shares of the examples that a subset has
    subsets: int = 200  # of each share
    # how much of their weight examples lose, of as many random sets as `sized`, each a tenth of the examples
    sizes: tuple[float, ...] = (1e-7, 1e-5, 1e-3, 1e-2, 0.1, 1.0)
    sized: int = 40

    @property
    def steps(self) -> int:
        """Of a run: whole epochs."""
        return self.epochs * (self.examples // self.batch)

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order of the tables."""
        replays = ("replay", *(f"replay-h{h}" for h in self.horizons))
        return (*replays, "path", "path, credit", "first", "sgd-proxy", "last checkpoint", "random", CENTRED)

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name."""
        return fingerprint(self, but=NOT_HASHED)


QUICK = Study(
    source="blobs", examples=40, held_out=40, hidden=(16,), batch=10, epochs=3, warmup=4, seeds=(0,), horizons=(5, 0),
    settings=ALL_SETTINGS[:1] + ALL_SETTINGS[-1:], reduced=("replay", "replay-h5", "path"), subsets=20,
    sizes=(1e-7, 1.0), sized=5,
)  # fmt: skip


class Data:
    """A seed's training set, with its wrong labels, its batches and its target."""

    def __init__(self, study: Study, seed: int, dtype: torch.dtype) -> None:
        self._study, self._random = study, np.random.default_rng(seed)
        features, labels = READ[study.source](study)
        chosen = self._random.permutation(len(labels))[: study.examples + study.held_out]
        x_ND, y_N = torch.from_numpy(features[chosen]).to(dtype), torch.from_numpy(labels[chosen]).long()
        self.x, self.target = x_ND[: study.examples], (x_ND[study.examples :], y_N[study.examples :])
        y = y_N[: study.examples]
        self.wrong = torch.zeros(len(y), dtype=torch.bool)
        self.wrong[self._random.choice(len(y), round(study.wrong * len(y)), replace=False)] = True
        others = torch.from_numpy(self._random.integers(1, CLASSES, len(y)))
        self.y = torch.where(self.wrong, (y + others) % CLASSES, y)
        orders = np.stack([self._random.permutation(len(y)) for _ in range(study.epochs)])
        whole = len(y) // study.batch * study.batch
        self.places = torch.from_numpy(orders[:, :whole].reshape(-1, study.batch))  # [steps, B]

    def batch(self, places: Tensor) -> Batch:
        return self.x[places], self.y[places]


def _digits(study: Study) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images of 8 by 8 numbers from 0 to 1."""
    features, labels = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)  # only for the study
    return features / 16, labels


def _blobs(study: Study) -> tuple[NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(0)
    labels = random.integers(CLASSES, size=study.examples + study.held_out)
    centres = random.normal(size=(CLASSES, FEATURES))
    return centres[labels] + 0.7 * random.normal(size=(len(labels), FEATURES)), labels


READ = {"digits": _digits, "blobs": _blobs}


@dataclass(frozen=True)
class Piece:
    """What is computed and stored at a time: of a run its values, or trainings on subsets, without a single example, or
    with smaller weights.
    """

    optimizer: str
    rate: float
    activation: str
    decay: bool
    seed: int
    part: Literal["values", "subsets", "single", "sizes"] = "values"

    @property
    def name(self) -> str:
        setting = f"{self.activation}-{'cosine' if self.decay else 'constant'}".lower()
        return f"{self.optimizer}-{self.rate:g}-{setting}-{self.part}-seed{self.seed}"

    def whole(self, study: Study) -> bool:
        """Whether all methods are tried here."""
        return (self.activation, self.decay) == study.settings[0]


def pieces_of(study: Study) -> Iterator[Piece]:
    decay = study.settings[0][1]
    for optimizer, rate in study.optimizers:
        for seed in study.seeds:
            for setting in study.settings:
                for part in ("values", "subsets", "single"):
                    yield Piece(optimizer, rate, *setting, seed, part)
            for activation in dict.fromkeys(name for name, of in study.settings if of == decay):
                yield Piece(optimizer, rate, activation, decay, seed, "sizes")


class Run:
    """A training that can be done again: the same weights to begin with, batches and rates."""

    def __init__(self, study: Study, piece: Piece, dtype: torch.dtype = torch.float32) -> None:
        self.study, self.piece, self.data, self.dtype = study, piece, Data(study, piece.seed, dtype), dtype

    def make(self) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(self.piece.seed)
        widths, layers = (FEATURES, *self.study.hidden), list[nn.Module]()
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), getattr(nn, self.piece.activation)()]
        model = nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES)).to(self.dtype)
        return model, self.optimizer(model.parameters())

    def optimizer(self, weights: Iterable[Tensor]) -> Optimizer:
        return OPTIMIZERS[self.piece.optimizer](weights, self.piece.rate)

    @property
    def target(self) -> Batch:
        return self.data.target

    def losses(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        return losses(model, batch)

    def batches(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, Batch]]:
        """By step the examples' places and the batch, the rate having been set."""
        study = self.study
        for step, places in enumerate(self.data.places, start=1):
            share = min(1.0, step / study.warmup)
            if self.piece.decay and step > study.warmup:
                share = 0.5 + 0.5 * math.cos(math.pi * (step - study.warmup) / (study.steps - study.warmup + 1))
            for group in optimizer.param_groups:
                group["lr"] = self.piece.rate * share
            yield places, self.data.batch(places)


def losses(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Cross-entropy by example, in nats: [B]."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return losses(model, batch).mean()


def values_of(study: Study, piece: Piece) -> dict[str, Any]:
    """The run in float32, with values by every method.

    Returns:
        `NAME` [N] for every method: the sum of an example's values; `wrong` [N]: whose label is; `loss` [2]: the
        target's at the beginning and the end; `right` [2]: shares that the model has right at the end, of the target
        and of the training examples with right labels; `adjoint` [steps]: of the full replay, its norm after each.
    """
    run, found, ends = Run(study, piece), dict[str, Any](), set()
    model, optimizer = run.make()
    before = float(loss(model, run.data.target).detach())
    methods = study.methods if piece.whole(study) else study.reduced
    with tempfile.TemporaryDirectory() as folder:
        for method, settings in VALUED.items():
            if method in methods:
                ends.add(train_valued(run, Path(folder) / method, settings))
                found[method] = totals(Ledger(Path(folder) / method), study.examples)
        for name, horizon in (("replay", None), *((f"replay-h{h}", h) for h in study.horizons)):
            if name in methods:
                values = replayed(run, Path(folder) / "path", model, optimizer, horizon)
                found[name] = totals(values, study.examples)
            if horizon is None:
                found[CENTRED] = totals(values, study.examples, centred=True)
                found["adjoint"] = values.steps().sort("step")["adjoint"].to_numpy()
    ends.add(str(hash_of(model)))
    if piece.whole(study):
        found |= _proxies(run)
        ends.add(found.pop("end"))
        found["random"] = np.random.default_rng([piece.seed, 1]).normal(size=study.examples)
    assert len(ends) == 1, f"{piece.name}: the weights depend on how the values are computed"
    with torch.no_grad():
        found["loss"] = np.array([before, float(loss(model, run.data.target))])
        of_target, of_train = (model(x).argmax(1) == y for x, y in (run.data.target, (run.data.x, run.data.y)))
    found["right"] = np.array([float(of.float().mean()) for of in (of_target, of_train[~run.data.wrong])])
    return found | {"wrong": run.data.wrong.numpy()}


def replayed(run: Run, folder: Path, model: nn.Module, optimizer: Optimizer, horizon: float | None = None) -> Ledger:
    """The values at the end of a recorded run."""
    targets = {TARGET: run.data.target}
    return replay(
        folder, targets, loss, model=model, optimizer=optimizer, horizon=horizon, progress=lambda done, steps, now: None
    )


def train_valued(run: Run, ledger: Path, settings: Mapping[str, Any]) -> str:
    """With an Attributor, as in a user's loop. Returns the hash of the weights."""
    model, optimizer = run.make()
    given: dict[str, Any] = {"kernel": "tangent", "ledger": ledger, **settings}
    with Attributor(model, optimizer, {TARGET: run.data.target}, loss, **given) as attributor:
        for places, batch in run.batches(optimizer):
            with attributor.batch(places, data=batch):
                loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return str(hash_of(model))


def _proxies(run: Run) -> dict[str, Any]:
    """Values that know nothing of the optimizer, and the hash of the weights that they are of (`end`).

    sgd-proxy: the sum over the steps of rate * <g_i, grad L> at the step's weights, g_i of the mean over the batch.
    last checkpoint: <grad of i's loss, grad L> after the last step, once.
    """
    model, optimizer = run.make()
    proxy = torch.zeros(run.study.examples, dtype=torch.float64)
    for places, batch in run.batches(optimizer):
        rate = float(optimizer.param_groups[0]["lr"])
        proxy[places] += rate / len(places) * _products(model, batch, run.data.target)
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    last = _products(model, (run.data.x, run.data.y), run.data.target)
    return {"sgd-proxy": proxy.numpy(), "last checkpoint": last.numpy(), "end": str(hash_of(model))}


def _products(model: nn.Module, batch: Batch, target: Batch) -> Tensor:
    """<grad of every example's loss, the target's gradient>: float64 [B]."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    of_target = grad(one)(weights, *target)
    each = vmap(grad(one), in_dims=(None, 0, 0))(weights, *batch)
    parts = [each[name].flatten(1).double() @ of_target[name].flatten().double() for name in weights]
    return torch.stack(parts).sum(dim=0)
