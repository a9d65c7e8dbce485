"""The truth, which the values are held against: training again on subsets, without one example, without the lowest."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.replay.training import VALUED, Piece, Run, Study, replayed, train_valued, values_of
from experiments.retraining import check, loss_alone, losses_at_end, random_subsets
from experiments.values import totals


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
            check(run, piece.name, keep, ends, removed)
            found[f"{name}-{kept:g}"] = ends.numpy()
    return found


def without_one(study: Study, piece: Piece) -> dict[str, Any]:
    """`change` [N]: what it does to the target's loss at the end that one example has no weight."""
    run = Run(study, piece)
    ends = losses_at_end(run, ~torch.eye(study.examples, dtype=torch.bool), removed=False)
    return {"change": ends.numpy() - loss_alone(run, torch.ones(study.examples), removed=False)}


def by_size(study: Study, piece: Piece) -> dict[str, Any]:
    """In float64, what it does to the loss at the end that a tenth of the examples lose a part of their weight.

    Returns:
        `real` [sizes, S]: the loss's change; `first_order` [sizes, S]: what the replay's values say of it.
    """
    run = Run(study, piece, torch.float64)
    model, optimizer = run.make()
    with tempfile.TemporaryDirectory() as folder:
        train_valued(run, Path(folder), VALUED["path"])
        values = totals(replayed(run, Path(folder), model, optimizer), study.examples)
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
