"""A training that can be done again, and its values by every method.

N are the training examples, B those of a batch; values are of the target's loss in nats, and positive helps.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from experiments import baselines
from experiments.counterfactual.config import CENTRED, HORIZON, IN_RUN, REPLAY, Model, Piece
from experiments.counterfactual.data import data_of
from experiments.counterfactual.networks import network
from experiments.pieces import hash_of
from experiments.results import Array
from experiments.retraining import Batch
from experiments.values import totals
from inrun import Attributor, Ledger, replay

TARGET = "held out"


class Run:
    """A model's training on a seed's data, with the weights and the order of `begun`: by default of the seed itself."""

    def __init__(self, model: Model, seed: int, path: Path, begun: int | None = None) -> None:
        self.model, self.seed, self.begun = model, seed, seed if begun is None else begun
        self.data = data_of(model, seed, path)
        random = np.random.default_rng([self.begun, 1])
        orders = np.stack([random.permutation(model.examples) for _ in range(model.epochs)])
        whole = model.steps // model.epochs * model.batch
        self.places = torch.from_numpy(orders[:, :whole].reshape(-1, model.batch))  # [steps, B]

    @property
    def target(self) -> Batch:
        return self.data.target

    def make(self) -> tuple[nn.Module, Optimizer]:
        model = network(self.model, self.begun)
        return model, self.optimizer(p for p in model.parameters() if p.requires_grad)

    def optimizer(self, weights: Iterable[Tensor]) -> Optimizer:
        return AdamW(weights, lr=self.model.rate)

    def batches(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, Batch]]:
        """By step the examples' places and the batch, the rate having been set."""
        steps, warmup = self.model.steps, self.model.warmup
        for step, places in enumerate(self.places, start=1):
            share = min(1.0, step / warmup)
            if step > warmup:
                share = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup + 1))
            for group in optimizer.param_groups:
                group["lr"] = self.model.rate * share
            inputs, labels = self.data.train
            yield places, (inputs[places], labels[places])

    def losses(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Of every example, the mean over its tokens, in nats: [B]."""
        inputs, labels = batch
        each = F.cross_entropy(model(inputs).movedim(-1, 1), labels, reduction="none")
        return each.flatten(1).mean(dim=1) if each.ndim > 1 else each

    def loss(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        return self.losses(model, batch).mean()

    def trained(self) -> nn.Module:
        """Plainly, as it ends."""
        model, optimizer = self.make()
        for _, batch in self.batches(optimizer):
            self.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return model


def in_run(piece: Piece, path: Path) -> dict[str, Any]:
    """A run with an Attributor, as in a user's loop; for `path` also its replays.

    Returns:
        `NAME` [N]: the sum of an example's values, and `seconds NAME`: what they took with the run, or beyond it for
        replays; `target` [2]: its loss before and after; `adjoint` [steps]: of the full replay, its norm; `weights`:
        their hash at the end.
    """
    scheme, run = piece.part.removeprefix("in-run "), Run(piece.model, piece.seed, path)
    found: dict[str, Any] = {}
    model, optimizer = run.make()
    before = float(run.loss(model, run.target).detach())
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.monotonic()
        settings: dict[str, Any] = {"kernel": "tangent", "ledger": folder, **IN_RUN[scheme]}
        with Attributor(model, optimizer, {TARGET: run.target}, run.loss, **settings) as attributor:
            for places, batch in run.batches(optimizer):
                with attributor.batch(places, data=batch if "replayable" in settings else None):
                    run.loss(model, batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        found |= {scheme: totals(Ledger(folder), piece.model.examples), f"seconds {scheme}": time.monotonic() - begun}
        replays = ((REPLAY, None), (HORIZON, piece.model.horizon)) if "replayable" in settings else ()
        for method, horizon in replays:
            begun = time.monotonic()
            values = replay(
                folder, {TARGET: run.target}, run.loss, model=model, optimizer=optimizer, horizon=horizon,
                progress=lambda done, steps, now: None,
            )  # fmt: skip
            found |= {method: totals(values, piece.model.examples), f"seconds {method}": time.monotonic() - begun}
            if horizon is None:
                found[CENTRED] = totals(values, piece.model.examples, centred=True)
                found["adjoint"] = values.steps().sort("step")["adjoint"].to_numpy()
    with torch.no_grad():
        found["target"] = np.array([before, float(run.loss(model, run.target))])
    return found | {"weights": hash_of(model)}


def rivals(piece: Piece, path: Path) -> dict[str, Any]:
    """Values that need no Attributor: [N] each, `seconds NAME`, and the hash of the `weights` that they are of.

    sgd-proxy: the sum over the steps of rate * <g_i, grad L> at the step's weights, g_i of the mean over the batch.
    influence: what the mean loss of the N examples loses without example i, so divided by N.
    training loss: minus the example's, after training. group: whether it is of the target's domain, or its label right.
    """
    setting, run = piece.model, Run(piece.model, piece.seed, path)
    found: dict[str, Any] = {}
    model, optimizer = run.make()

    def one(weights: baselines.Weights, *example: Tensor) -> Tensor:
        batch = tuple(tensor[None] for tensor in example)
        return run.loss(lambda *given: functional_call(model, weights, given), batch)

    def timed(name: str, of: Callable[[], Array]) -> None:
        begun = time.monotonic()
        found[name] = np.asarray(of(), dtype=np.float64)
        found[f"seconds {name}"] = time.monotonic() - begun

    def proxy() -> Array:
        sums = np.zeros(setting.examples)
        for places, batch in run.batches(optimizer):
            rate = float(optimizer.param_groups[0]["lr"])
            products = baselines.products(baselines.weights_of(model), one, batch, [run.target])[0]
            sums[places.numpy()] += rate / len(places) * products
            run.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return sums

    timed("sgd-proxy", proxy)
    last, ends, train = baselines.weights_of(model), hash_of(model), run.data.train
    random = np.random.default_rng([piece.seed, 2])
    some = torch.from_numpy(random.permutation(setting.examples)[: setting.hessian])
    of = tuple(tensor[some] for tensor in train)

    def influence() -> Array:
        damping, iterations = setting.damping, setting.iterations
        found = baselines.influence(last, one, train, [run.target], damping=damping, iterations=iterations, of=of)
        return np.asarray(found[0] / setting.examples)

    timed("influence", influence)
    timed("gradient product", lambda: baselines.products(last, one, train, [run.target])[0])
    with torch.no_grad():
        timed("training loss", lambda: -torch.cat([run.losses(model, part) for part in chunks(train)]).double().numpy())

    def trak() -> Array:
        others = (Run(setting, piece.seed, path, other(piece.seed, k)) for k in range(setting.trak - 1))
        models = [last, *(baselines.weights_of(another.trained()) for another in others)]
        given = (model, models, one, train, [run.target])
        return np.asarray(baselines.trak(*given, dimensions=setting.dimensions, seed=piece.seed)[0])

    timed("TRAK", trak)
    ties = 1e-6 * random.random(setting.examples)  # which of equal ones are removed is a matter of chance
    found["group"] = run.data.group + ties
    return found | {"random": random.normal(size=setting.examples), "weights": ends}


def chunks(examples: Batch) -> Iterator[Batch]:
    return baselines.chunks(examples)


def other(seed: int, k: int) -> int:
    """The k-th other seed of weights and order."""
    return 1000 * (seed + 1) + k
