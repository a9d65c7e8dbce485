"""The truth: really training again, from the same weights on the same batches in the same order, without some examples.

Trainings on many subsets go at once, with a leading dimension of subsets (S) on the weights; torch's own optimizer
moves them all, as what AdamW and SGD do to a number depends on nothing but that number and its gradients. Some of the
subsets are trained again by themselves.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from experiments.replay.training import (
    OPTIMIZERS,
    VALUED,
    Piece,
    Run,
    Study,
    loss,
    losses,
    replayed,
    totals,
    train_valued,
    values_of,
)

CHUNK = 50  # subsets at once
CHECKED = 2  # subsets trained by themselves
TOLERANCE = 1e-3  # nats, for those: float32, with sums in another order at every step


def work(study: Study, piece: Piece) -> dict[str, Any]:
    """A piece, as it is stored."""
    if piece.part == "subsets":
        found = trained_again(study, piece)
    elif piece.part == "single":
        found = without_one(study, piece)
    elif piece.part == "sizes":
        found = by_size(study, piece)
    else:
        found = values_of(study, piece)
        found |= without_lowest(study, piece, found) if piece.whole(study) else {}
    return found


def trained_again(study: Study, piece: Piece) -> dict[str, Any]:
    """Random subsets, and the target's loss after training on each.

    Returns:
        `keep-P` [S, N] for every share P: which examples are kept; `weightless-P` [S]: the loss at the end if the
        others have no weight in their batches' mean; `removed-P` [S]: if the mean is over those that are kept.
    """
    run, found = Run(study, piece), {}
    for kept in study.kept:
        keep = random_subsets(study.subsets, study.examples, kept, piece.seed)
        found[f"keep-{kept:g}"] = keep.numpy()
        for name, removed in (("weightless", False), ("removed", True)):
            if removed and not piece.whole(study):
                continue
            ends = losses_at_end(run, keep, removed)
            _check(run, keep[:CHECKED], ends, removed)
            found[f"{name}-{kept:g}"] = ends.numpy()
    return found


def without_one(study: Study, piece: Piece) -> dict[str, Any]:
    """`change` [N]: what it does to the target's loss at the end that one example has no weight."""
    run = Run(study, piece)
    ends = losses_at_end(run, ~torch.eye(study.examples, dtype=torch.bool), removed=False)
    return {"change": ends.numpy() - loss_alone(run, torch.ones(study.examples), removed=False)}


def random_subsets(subsets: int, examples: int, kept: float, seed: int) -> Tensor:
    """Which examples each keeps: [S, N]."""
    random = np.random.default_rng([seed, round(1000 * kept)])
    places = np.argsort(random.random((subsets, examples)), axis=1)
    keep = torch.zeros(places.shape, dtype=torch.bool)
    return keep.scatter_(1, torch.from_numpy(places[:, : round(kept * examples)]), True)


def by_size(study: Study, piece: Piece) -> dict[str, Any]:
    """In float64, what it does to the loss at the end that a tenth of the examples lose a part of their weight.

    Returns:
        `real` [sizes, S]: the loss's change; `first_order` [sizes, S]: what the replay's values say of it.
    """
    run = Run(study, piece, torch.float64)
    model, optimizer = run.make()
    with tempfile.TemporaryDirectory() as folder:
        train_valued(run, Path(folder), VALUED["path"])
        values = totals(study, replayed(run, Path(folder), model, optimizer))
    out = ~random_subsets(study.sized, study.examples, 0.9, piece.seed)
    whole = loss_alone(run, torch.ones(study.examples), removed=False)
    real = [losses_at_end(run, 1 - size * out.double(), removed=False).numpy() - whole for size in study.sizes]
    return {"real": np.stack(real), "first_order": np.outer(study.sizes, out.double().numpy() @ values)}


def without_lowest(study: Study, piece: Piece, values: dict[str, Any]) -> dict[str, Any]:
    """`without` [methods]: the target's loss after training without as many examples as have wrong labels, those of the
    lowest values by each method; `without_wrong` [1]: without those whose labels are wrong. The mean of a batch is over
    those that are left.
    """
    run, wrong = Run(study, piece), values["wrong"]
    keep = np.ones((len(study.methods) + 1, study.examples), dtype=bool)
    for row, method in zip(keep, study.methods, strict=False):
        row[np.argsort(values[method], kind="stable")[: wrong.sum()]] = False
    keep[-1] = ~wrong
    ends = losses_at_end(run, torch.from_numpy(keep), removed=True).numpy()
    return {"without": ends[:-1], "without_wrong": ends[-1:]}


def weights_in_batch(weights: Tensor, removed: bool, dtype: torch.dtype) -> Tensor:
    """What each loss of a batch is multiplied with, by the weights of its examples: [..., B]."""
    given = weights.to(dtype)
    return given / (given.sum(dim=-1, keepdim=True).clamp(min=1) if removed else given.shape[-1])


def losses_at_end(run: Run, keep: Tensor, removed: bool) -> Tensor:
    """The target's loss after training on each subset, or with each set of weights [S, N]: float64 [S]."""
    return torch.cat([_together(run, chunk, removed) for chunk in torch.split(keep, CHUNK)])


def _together(run: Run, keep: Tensor, removed: bool) -> Tensor:
    model, _ = run.make()
    weights = {
        name: p.detach().expand(len(keep), *p.shape).clone().requires_grad_() for name, p in model.named_parameters()
    }
    optimizer = OPTIMIZERS[run.piece.optimizer](list(weights.values()), run.piece.rate)
    model.requires_grad_(False)

    def of_subset(weights: dict[str, Tensor], in_batch: Tensor, x: Tensor, y: Tensor) -> Tensor:
        each: Tensor = nn.functional.cross_entropy(functional_call(model, weights, (x,)), y, reduction="none")
        return (each * in_batch).sum()

    of_all = vmap(of_subset, in_dims=(0, 0, None, None))
    for places, (x, y) in run.batches(optimizer):
        of_all(weights, weights_in_batch(keep[:, places], removed, run.dtype), x, y).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    x, y = run.data.target
    with torch.no_grad():
        found: Tensor = of_all(weights, torch.full((len(keep), len(y)), 1 / len(y), dtype=run.dtype), x, y)
    return found.double()


def loss_alone(run: Run, keep: Tensor, removed: bool) -> float:
    """The target's loss after one training, as anybody would write it."""
    model, optimizer = run.make()
    for places, batch in run.batches(optimizer):
        (losses(model, batch) * weights_in_batch(keep[places], removed, run.dtype)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(loss(model, run.data.target))


def _check(run: Run, keep: Tensor, ends: Tensor, removed: bool) -> None:
    for row, one in enumerate(keep):
        alone = loss_alone(run, one, removed)
        if abs(alone - float(ends[row])) > TOLERANCE:
            raise AssertionError(
                f"{run.piece.name}: subset {row} ends at {alone:.6f} nats if it is trained by itself, and at "
                f"{float(ends[row]):.6f} among others"
            )
