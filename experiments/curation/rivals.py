"""What else there is to find bad text with, of the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from experiments import baselines
from experiments.baselines import Weights
from experiments.curation.config import Piece, Study
from experiments.curation.mixture import Data, data_of
from experiments.language import GPT, losses_of, model_of, optimizer_of, set_rate, train_step
from experiments.pieces import hash_of


def one_of(model: GPT) -> Callable[..., Tensor]:
    """The loss of one block, of the weights."""

    def one(weights: Weights, block_T: Tensor) -> Tensor:
        logits_TV = functional_call(model, weights, (block_T[None],))[0]
        return F.cross_entropy(logits_TV[:-1], block_T[1:])

    return one


def proxy(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """The run, looked at from outside.

    Returns:
        `sgd-proxy` [epochs, N]: the rate times <g_i, grad L> of the step's target batch, g_i of the batch's mean: what
        In-Run Data Shapley was published as, which takes Adam for SGD; `loss` [N]: minus the block's loss by the last
        weights, what a perplexity filter goes by; `weights`: the hash of the weights at the end.
    """
    data, model, optimizer = begun(study, text, piece)
    found, one, batches = np.zeros((study.epochs, study.blocks)), one_of(model), data.targets[study.main]
    for step, (epoch, places) in enumerate(data.steps(study)):
        rate, blocks = set_rate(study, optimizer, step), data.blocks[places]
        target = (batches[step % len(batches)],)
        (each,) = baselines.products(baselines.weights_of(model), one, (blocks,), [target])
        found[epoch, places] = rate / study.batch * each
        train_step(model, optimizer, blocks)
    return {"sgd-proxy": found, "loss": -losses_of(model, data.blocks), "weights": hash_of(model)}


def influence(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """`influence` [N], of the last weights; `weights`: their hash."""
    data, model, optimizer = begun(study, text, piece)
    for step, (_, places) in enumerate(data.steps(study)):
        set_rate(study, optimizer, step)
        train_step(model, optimizer, data.blocks[places])
    weights, train, targets = baselines.weights_of(model), (data.blocks,), [(data.whole,)]
    sample = torch.from_numpy(np.random.default_rng(piece.seed).permutation(study.blocks)[: study.hessian])
    (found,) = baselines.influence(
        weights, one_of(model), train, targets, damping=study.damping, iterations=study.iterations,
        of=(data.blocks[sample],),
    )  # fmt: skip
    return {"influence": found, "weights": hash_of(model)}


def begun(study: Study, text: Path, piece: Piece) -> tuple[Data, GPT, torch.optim.Optimizer]:
    """The run before its first step."""
    model = model_of(study, piece.seed)
    return data_of(study, text, piece.seed), model, optimizer_of(study, model)
