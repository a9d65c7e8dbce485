"""What really happens: the target's loss at the end of trainings without some examples.

All are changes, in nats, against training with all examples in the same way: the same weights at the beginning, the
same batches in the same order, S trainings at once or one by one. `others`: beginnings and orders that no value knows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.counterfactual.config import GAMES, RANDOM, Piece
from experiments.counterfactual.training import Run, other
from experiments.results import Array
from experiments.retraining import check, losses_at_end, random_subsets


def changes(run: Run, keep: Tensor, removed: bool = True) -> Array:
    """The target's loss after training on each subset [S, N], less that after training on all: [S]."""
    everything = torch.ones_like(keep[:1])
    ends = losses_at_end(run, torch.cat([everything, keep]), removed, run.model.at_once)
    if run.model.at_once > 1:
        check(run, f"{run.model.name}, seed {run.seed}", torch.cat([everything, keep]), ends, removed)
    return (ends[1:] - ends[0]).numpy()


def runs_of(piece: Piece, path: Path) -> list[Run]:
    """Of the values themselves, and those with other weights and orders."""
    begun = (None, *(other(piece.seed, k) for k in range(piece.model.others)))
    return [Run(piece.model, piece.seed, path, of) for of in begun]


def subsets(piece: Piece, path: Path) -> dict[str, Any]:
    """A block of random subsets, of one share.

    Returns:
        `keep` [S, N]: which examples are kept; `removed` [1 + others, S]: the changes, by run; for the second game
        `weightless` [S].
    """
    model, share = piece.model, float(piece.part.split()[1])
    keep = random_subsets(dict(model.kept)[share], model.examples, share, piece.seed)
    keep = keep[piece.block * model.block :][: model.block]
    runs = runs_of(piece, path)
    found = {"keep": keep.numpy(), GAMES[0]: np.stack([changes(run, keep) for run in runs])}
    if GAMES[1] in model.games and share == max(dict(model.kept)):
        found[GAMES[1]] = changes(runs[0], keep, removed=False)
    return found


def single(piece: Piece, path: Path) -> dict[str, Any]:
    """`left_out` [S]: examples, each left out by itself; `change` [S]: what it does."""
    places = np.random.default_rng([piece.seed, 3]).permutation(piece.model.examples)[: piece.model.single]
    keep = torch.ones(len(places), piece.model.examples, dtype=torch.bool)
    keep[torch.arange(len(places)), torch.from_numpy(places)] = False
    return {"left_out": places, "change": changes(Run(piece.model, piece.seed, path), keep)}


def removals(piece: Piece, path: Path, values: Array) -> dict[str, Any]:
    """`change` [1 + others, shares, 2]: without the lowest and without the highest values of a method; of `random`
    [1 + others, shares, draws], without as many at random.
    """
    model = piece.model
    sets: list[Array] = []
    for k, share in enumerate(model.removed):
        count = max(1, round(share * model.examples))
        if piece.part == f"remove {RANDOM}":
            random = np.random.default_rng([piece.seed, 4, k])
            sets += [random.permutation(model.examples)[:count] for _ in range(model.draws)]
        else:
            order = np.argsort(values, kind="stable")
            sets += [order[:count], order[-count:]]
    keep = torch.ones(len(sets), model.examples, dtype=torch.bool)
    for row, out in zip(keep, sets, strict=True):
        row[torch.from_numpy(out.copy())] = False
    found = np.stack([changes(run, keep) for run in runs_of(piece, path)])
    return {"change": found.reshape(len(found), len(model.removed), -1)}
