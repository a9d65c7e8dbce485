"""What else there is to find wrong labels with, on the same images, weights and order.

Arrays of [N] are of the training images; the lower, the more likely is a label to be wrong.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from experiments import baselines
from experiments.baselines import Weights
from experiments.mislabel.config import Piece, Study
from experiments.mislabel.training import Data, Run, data_of, run_of, valued
from experiments.pieces import hash_of
from experiments.values import NORMALISED


def one_of(model: nn.Module) -> Callable[..., Tensor]:
    """The loss of one image, of the weights."""

    def one(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    return one


def passes(study: Study, piece: Piece) -> dict[str, Any]:
    """The run once more, looked at from outside, and what its last weights say.

    Returns:
        `sgd-proxy` [N]: the sum over the steps of the rate times <g_i, grad L> of the step's target batch, g_i of the
        batch's mean: what In-Run Data Shapley was published as, which takes Adam for SGD; `loss` [N]: minus the mean
        over epochs of the image's own loss; `TracIn`, `influence`, `gradient`, `cosine` [N]; `KNN, features` and
        `KNN, pixels` [N]; `random`; `right first`, the oracle; `weights`: the hash of the weights at the end.
    """
    run = run_of(study, piece)
    model, data = run.model(), run.data
    optimizer, one = run.optimizer(model), one_of(model)
    batches = run.targets()
    proxy, own = np.zeros(study.examples), np.zeros(study.examples)
    checkpoints, every = [], study.steps // study.checkpoints
    for step, (_, places) in enumerate(data.steps(study.batch)):
        weights, batch = baselines.weights_of(model), (data.x[places], data.y[places])
        (found,) = baselines.products(weights, one, batch, [batches[step % len(batches)]])
        proxy[places.numpy()] += study.rate / len(places) * found
        with torch.no_grad():
            own[places.numpy()] -= F.cross_entropy(model(batch[0]), batch[1], reduction="none").numpy() / study.epochs
        run.step(model, optimizer, places)
        if (step + 1) % every == 0:
            checkpoints.append(baselines.weights_of(model))
    train, last = (data.x, data.y), baselines.weights_of(model)
    with torch.no_grad():
        of_train, of_target = (model.features(x).numpy() for x in (data.x, data.target[0]))  # type: ignore[operator]
    classes = (data.y.numpy(), data.target[1].numpy())
    pixels = (data.x.flatten(1).numpy(), data.target[0].flatten(1).numpy())
    rates = [study.rate] * len(checkpoints)
    found = {
        "sgd-proxy": proxy, "loss": own,
        "TracIn": baselines.tracin(checkpoints, rates, one, train, [data.target])[0],
        "gradient": baselines.products(last, one, train, [data.target])[0],
        "cosine": baselines.products(last, one, train, [data.target], cosine=True)[0],
        "random": np.random.default_rng([piece.seed, 1]).normal(size=study.examples),
        "right first": np.random.default_rng([piece.seed, 2]).uniform(size=study.examples) - data.wrong.numpy(),
        "weights": hash_of(model),
    }  # fmt: skip
    if piece.source != "blobs":  # libraries that only the studies need
        found["influence"] = baselines.influence(
            last, one, train, [data.target], damping=study.damping, iterations=study.iterations
        )[0]
        for name, (of, their) in (("features", (of_train, of_target)), ("pixels", pixels)):
            found[f"KNN, {name}"] = baselines.knn_shapley((of, classes[0]), (their, classes[1]), study.neighbours)
    return found


def early(study: Study, piece: Piece) -> dict[str, Any]:
    """`EL2N`, `GraNd` [N]: minus the means over models of the length of the error vector, and of the gradient."""
    run = run_of(study, piece)
    errors, lengths = [], []
    for other in range(1, study.inits + 1):
        model = run.model(other)
        for _ in run.train(model, study.early):
            pass
        with torch.no_grad():
            errors.append(model(run.data.x).softmax(1).double().numpy())
        weights = baselines.weights_of(model)
        lengths.append(baselines.against(weights, one_of(model), (run.data.x, run.data.y), [weights])[1])
    return {"EL2N": baselines.el2n(errors, run.data.y.numpy()), "GraNd": -np.mean(lengths, axis=0)}


def trak(study: Study, piece: Piece) -> dict[str, Any]:
    """`TRAK-1`, `TRAK-many` [N]: by the run's own last weights, and by those of several trainings."""
    run, ends = run_of(study, piece), []
    for other in range(study.models):
        model = run.model(other)
        for _ in run.train(model):
            pass
        ends.append(baselines.weights_of(model))
    given = (one_of(model), (run.data.x, run.data.y), [run.data.target])
    return {
        name: baselines.trak(model, of, *given, dimensions=study.dimensions, seed=piece.seed)[0]
        for name, of in (("TRAK-1", ends[:1]), ("TRAK-many", ends))
    }


def small(study: Study, piece: Piece) -> dict[str, Any]:
    """On fewer images for fewer epochs: `Data Shapley`, and beside it what else costs little [small].

    Returns:
        `path`, `path, by step`, `replay-hH`, `KNN, pixels`, and `wrong`; `trainings`: how often there was trained.
    """
    less = replace(study, examples=study.small, epochs=study.small_epochs, target=study.small_target)
    found = valued(less, replace(piece, part="in-run path"))
    data = data_of(less, piece.source, piece.seed)
    train, target = ((x.flatten(1).numpy(), y.numpy()) for x, y in ((data.x, data.y), data.target))
    classifier = Classifier(less, piece.seed, data)
    shapley = baselines.data_shapley(train, target, classifier, study.updates, study.truncation, piece.seed)
    names = ("path", "path" + NORMALISED, f"replay-h{study.horizon}")
    return {
        **{name: np.atleast_2d(found[name]).sum(axis=0) for name in names},
        "Data Shapley": shapley, "KNN, pixels": baselines.knn_shapley(train, target, study.neighbours),
        "wrong": found["wrong"], "trainings": np.array(len(classifier.sizes)),
    }  # fmt: skip


class Classifier:
    """The run on a part of the images, as pyDVL wants it: what has fit, predict and score."""

    def __init__(self, study: Study, seed: int, data: Data, sizes: list[int] | None = None) -> None:
        self.study, self.seed, self.data = study, seed, data
        self.sizes: list[int] = [] if sizes is None else sizes  # of all trainings so far, by this one and its copies
        self._model: nn.Module | None = None

    def clone(self) -> "Classifier":
        return Classifier(self.study, self.seed, self.data, self.sizes)

    __deepcopy__ = __sklearn_clone__ = lambda self, memo=None: self.clone()

    def fit(self, x: Any, y: Any) -> "Classifier":
        given = replace(self.data, x=shaped(x), y=torch.as_tensor(y), wrong=torch.zeros(len(y), dtype=torch.bool))
        run = Run(self.study, self.seed, given.only(torch.arange(len(y)), self.study.epochs, self.seed))
        self._model = run.model()
        for _ in run.train(self._model):
            pass
        self.sizes.append(len(y))
        return self

    def predict(self, x: Any) -> Any:
        assert self._model is not None
        with torch.no_grad():
            return self._model(shaped(x)).argmax(1).numpy()

    def score(self, x: Any, y: Any) -> float:
        return float((self.predict(x) == np.asarray(y)).mean())


def shaped(x: Any) -> Tensor:
    return torch.as_tensor(np.asarray(x), dtype=torch.float32).view(-1, 1, 28, 28)
