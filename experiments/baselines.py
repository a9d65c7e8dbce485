"""What others have: attributions that the studies compare with, by their own libraries where these have them.

All return float64 [targets, N], or [N]; positive helps, as in `inrun`. `one(weights, *example)` is the loss of one
example, of the weights by name; N examples are a tuple of tensors with the examples in dimension 0.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad, vmap

Example = tuple[Tensor, ...]
Weights = dict[str, Tensor]
One = Callable[..., Tensor]
Array = NDArray[np.float64]
CHUNK = 50  # examples whose gradients are had at once
LEAST = 1e-6  # of one minus a likelihood: its logarithm is taken


def weights_of(model: nn.Module) -> Weights:
    """Those that are trained, as they are now."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def chunks(examples: Example, size: int = CHUNK) -> Iterator[Example]:
    yield from zip(*(torch.split(tensor, size) for tensor in examples), strict=True)


def mean_gradient(weights: Weights, one: One, examples: Example) -> Weights:
    """Of the mean of these examples' losses."""
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for chunk in chunks(examples):
        each = grad(lambda w, chunk=chunk: vmap(one, in_dims=(None, *[0] * len(chunk)))(w, *chunk).sum())(weights)
        for name, part in each.items():
            found[name] += part / len(examples[0])
    return found


def against(weights: Weights, one: One, train: Example, directions: Sequence[Weights]) -> tuple[Array, Array]:
    """<g_i, direction> [directions, N] and |g_i| [N], of every example's gradient."""
    products: list[Tensor] = []
    norms: list[Tensor] = []
    each_of = vmap(grad(one), in_dims=(None, *[0] * len(train)))
    flat_of = [{name: part.flatten().double() for name, part in direction.items()} for direction in directions]
    for chunk in chunks(train):
        each = {name: part.flatten(1).double() for name, part in each_of(weights, *chunk).items()}
        products.append(torch.stack([sum_of(each[name] @ of[name] for name in each) for of in flat_of]))
        norms.append(sum_of(part.square().sum(dim=1) for part in each.values()).sqrt())
    return torch.cat(products, dim=1).numpy(), torch.cat(norms).numpy()


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(dim=0)


def products(weights: Weights, one: One, train: Example, targets: Sequence[Example], cosine: bool = False) -> Array:
    """<g_i, the gradient of a target's mean loss>; or their cosine."""
    directions = [mean_gradient(weights, one, target) for target in targets]
    found, norms = against(weights, one, train, directions)
    if not cosine:
        return found
    lengths = [float(sum_of(part.double().square().sum() for part in of.values()).sqrt()) for of in directions]
    return np.asarray(found / np.maximum(norms * np.array(lengths)[:, None], 1e-30))


def influence(
    weights: Weights,
    one: One,
    train: Example,
    targets: Sequence[Example],
    *,
    damping: float,
    iterations: int = 10,
    of: Example | None = None,
) -> Array:
    """Influence functions: <g_i, (H + damping)^-1 grad of the target's mean loss>, by dattri's conjugate gradients.

    H is the Hessian of the mean loss of the training examples, or of those in `of`.
    """
    solve = import_module("dattri.func.hessian").ihvp_cg
    names, data = list(weights), train if of is None else of
    flat = torch.cat([weight.flatten() for weight in weights.values()])

    def shaped(vector: Tensor) -> Weights:
        parts = torch.split(vector, [weights[name].numel() for name in names])
        return {name: part.view_as(weights[name]) for name, part in zip(names, parts, strict=True)}

    def mean_loss(vector: Tensor) -> Tensor:
        loss: Tensor = vmap(one, in_dims=(None, *[0] * len(data)))(shaped(vector), *data).mean()
        return loss

    inverse = solve(mean_loss, max_iter=iterations, regularization=damping)
    directions = []
    for target in targets:
        gradient = torch.cat([part.flatten() for part in mean_gradient(weights, one, target).values()])
        directions.append(shaped(inverse((flat,), gradient[None])[0].detach()))
    return against(weights, one, train, directions)[0]


def tracin(
    checkpoints: Sequence[Weights], rates: Sequence[float], one: One, train: Example, targets: Sequence[Example]
) -> Array:
    """TracInCP: the sum over checkpoints of the learning rate times <g_i, grad of the target's mean loss>."""
    found = [rate * products(of, one, train, targets) for of, rate in zip(checkpoints, rates, strict=True)]
    return np.asarray(np.sum(found, axis=0))


def trak(
    model: nn.Module,
    checkpoints: Sequence[Weights],
    one: One,
    train: Example,
    targets: Sequence[Example],
    *,
    dimensions: int = 512,
    seed: int = 0,
) -> Array:
    """TRAK (arXiv 2303.14186) by traker: what it says of a target's examples, in the mean.

    A model's output is the log-odds of its likelihood, which is the exponential of minus its loss. `dimensions` of the
    projection must be fewer than the examples and the weights: the library inverts a matrix of that size.
    """
    assert dimensions < min(len(train[0]), sum(weight.numel() for weight in checkpoints[0].values()))
    library, outputs = import_module("trak"), import_module("trak.modelout_functions")

    class LogOdds(outputs.AbstractModelOutput):  # type: ignore[name-defined, misc]
        def __init__(self) -> None: ...

        @staticmethod
        def get_output(of: nn.Module, weights: Weights, buffers: Weights, *example: Tensor) -> Tensor:
            loss = one(weights, *example)
            return -loss - torch.log((1 - torch.exp(-loss)).clamp(min=LEAST))

        def get_out_to_loss_grad(self, of: nn.Module, weights: Weights, buffers: Weights, batch: Example) -> Tensor:
            losses: Tensor = vmap(one, in_dims=(None, *[0] * len(batch)))(weights, *batch)
            return (1 - torch.exp(-losses)).clone().detach().unsqueeze(-1)

    state = model.state_dict()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        traker = library.TRAKer(
            model, LogOdds(), len(train[0]), save_dir=folder, device="cpu", proj_dim=dimensions, projector_seed=seed,
            use_half_precision=False, logging_level=logging.ERROR,
            grad_wrt=[name for name, p in model.named_parameters() if p.requires_grad],
        )  # fmt: skip
        for k, weights in enumerate(checkpoints):
            traker.load_checkpoint(state | weights, model_id=k)
            for chunk in chunks(train):
                traker.featurize(chunk, num_samples=len(chunk[0]))
        traker.finalize_features()
        found = []
        for n, target in enumerate(targets):
            for k, weights in enumerate(checkpoints):
                traker.start_scoring_checkpoint(f"target{n}", state | weights, k, num_targets=len(target[0]))
                for chunk in chunks(target):
                    traker.score(chunk, num_samples=len(chunk[0]))
            found.append(np.array(traker.finalize_scores(exp_name=f"target{n}"), dtype=np.float64).mean(axis=1))
    model.load_state_dict(state)
    return np.stack(found)


def knn_shapley(train: tuple[Any, Any], target: tuple[Any, Any], neighbours: int = 5) -> Array:
    """Exact Shapley values of a nearest-neighbour classifier, by pyDVL: of features [N, D] and classes [N]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the library uses
        library = import_module("pydvl.valuation")
        classifier = import_module("sklearn.neighbors").KNeighborsClassifier(n_neighbors=neighbours)
        valuation = library.KNNShapleyValuation(classifier, library.Dataset(*target), progress=False)
        valuation.fit(library.Dataset(*train))
    return by_index(valuation.result)


def data_shapley(
    train: tuple[Any, Any], target: tuple[Any, Any], classifier: Any, updates: int, truncation: float, seed: int
) -> Array:
    """Truncated Monte-Carlo Data Shapley of the accuracy, by pyDVL: `classifier` has fit, predict and score.

    Args:
        updates: marginals of every example, one in every order.
        truncation: an order ends where the accuracy is within this share of that with all examples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = import_module("pydvl.valuation")
        classes = len(np.unique(train[1]))
        scorer = library.SupervisedScorer(_accuracy, library.Dataset(*target), default=1 / classes, range=(0, 1))
        utility = library.ModelUtility(classifier, scorer, catch_errors=False, show_warnings=False)
        sampler = library.PermutationSampler(library.RelativeTruncation(rtol=truncation), seed=seed)
        valuation = library.ShapleyValuation(utility, sampler, library.MinUpdates(updates), progress=False)
        valuation.fit(library.Dataset(*train))
    return by_index(valuation.result)


def _accuracy(classifier: Any, x: Any, y: Any) -> float:
    return float(classifier.score(x, y))


def by_index(result: Any) -> Array:
    """A result of pyDVL's in the order of the examples."""
    found = np.empty(len(result.values))
    found[np.asarray(result.indices)] = result.values
    return found


def el2n(probabilities: Sequence[Array], classes: NDArray[np.int64]) -> Array:
    """Minus the mean over models of the length of a classifier's error vector (EL2N, arXiv 2107.07075)."""
    wanted = np.eye(probabilities[0].shape[1])[classes]
    return np.asarray(-np.mean([np.linalg.norm(of - wanted, axis=1) for of in probabilities], axis=0))
