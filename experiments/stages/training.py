"""The mixtures, the runs with their values, and the same steps without a source.

Tensors carry their shape in their name: N training blocks, T tokens.
"""

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from experiments import baselines
from experiments.baselines import Weights
from experiments.language import example_losses, loss, mean_loss_of, model_of, optimizer_of, set_rate, train_step
from experiments.pieces import hash_of
from experiments.results import Array
from experiments.sources import documents
from experiments.stages.config import LEFT_OUT, PROXY, SCHEMES, Piece, Study
from inrun import Attributor, Ledger
from inrun.lm.sources import rank

HELD_OUT = 0.1  # the share of a source's documents that nothing is trained on
FEW = 20
PSEUDO = 10.0  # pairs of tokens that are taken for seen, in the shares of single tokens


def write_text(study: Study, path: Path) -> None:
    """All text as blocks, in a file: `SOURCE` and `held out SOURCE` [blocks, T] of token numbers.

    A document is held out by a hash of its article's name, so that no article is in both; where there are few articles,
    by that of its own. The tokenizer is trained on
    what may be trained on. No block crosses documents.
    """
    from inrun.lm.tokens import train_tokenizer  # slow to import, and needed once

    texts: dict[str, list[str]] = {}
    for source in study.sources:
        kept: list[str] = []
        held: list[str] = []
        left, listed = study.characters, sorted(documents(source), key=lambda document: rank(document.id, 0))
        by_article = len({article(document.id) for document in listed}) >= FEW
        for document in listed:
            if left <= 0:
                break
            left -= len(document.text)
            name = article(document.id) if by_article else document.id
            place = int.from_bytes(rank(name, 1)[:4], "big") / 2**32
            (held if place < HELD_OUT else kept).append(document.text)
        texts[source], texts[f"held out {source}"] = kept, held
    tokenizer = train_tokenizer([text for source in study.sources for text in texts[source]], study.vocabulary)
    arrays: dict[str, Any] = {}
    for name, of in texts.items():
        rows = tokenizer(of, add_special_tokens=False)["input_ids"] if of else []
        whole = [row[: len(row) // study.length * study.length] for row in rows]
        arrays[name] = np.concatenate([np.empty(0), *whole]).astype(np.int32).reshape(-1, study.length)
    draft = path.with_suffix(".partial.npz")
    np.savez(draft, **arrays)
    draft.replace(path)


def article(document: str) -> str:
    return document.rpartition(".")[0]


@dataclass(frozen=True)
class Data:
    """A seed's training set in the order of its use, and its targets."""

    blocks: Tensor  # [N, T]
    source: Array  # [N]: the place in the mixture
    targets: Mapping[str, Tensor]  # [held out, T]


def data_of(study: Study, text: Path, piece: Piece) -> Data:
    """Equally many blocks of every source, each used once."""
    random, mixture = np.random.default_rng(piece.seed), study.mixture(piece.mixture)
    with np.load(text) as arrays:
        targets = {name: random.permutation(arrays[f"held out {name}"])[: study.held_out] for name in study.targets}
        counts = [study.blocks // len(mixture) + (k < study.blocks % len(mixture)) for k in range(len(mixture))]
        parts = [random.permutation(arrays[name])[:count] for name, count in zip(mixture, counts, strict=True)]
    for name, of, count in zip(mixture, parts, counts, strict=True):
        assert len(of) == count, f"{name} has only {len(of)} blocks, not {count}"
    order = random.permutation(study.blocks)
    source = np.repeat(np.arange(len(mixture)), counts)[order]
    return Data(
        torch.from_numpy(np.concatenate(parts)[order]).long(),
        source,
        {name: torch.from_numpy(of).long() for name, of in targets.items()},
    )


def work(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """A piece, as it is stored."""
    if piece.part == LEFT_OUT:
        return without_sources(study, text, piece)
    return proxies(study, text, piece) if piece.part == PROXY else valued(study, text, piece)


def places_of(study: Study, step: int) -> slice:
    """Of a step, counted from 0."""
    return slice(step * study.batch, (step + 1) * study.batch)


def turns(study: Study, data: Data) -> dict[str, list[Tensor]]:
    """Every target in batches that take turns."""
    return {name: list(torch.split(of, study.at_once)) for name, of in data.targets.items()}


def valued(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """A run with an Attributor, as in a user's loop.

    Returns:
        `values` [targets, steps, batch] in nats, in the order of use; `source` [steps, batch]; `loss` [targets, stages
        + 1]: each target's, of all its blocks, where stages begin, and at the end; `weights`: their hash at the end.
    """
    data, model = data_of(study, text, piece), model_of(study, piece.seed)
    optimizer, losses, every = optimizer_of(study, model), [], study.steps // study.stages
    with tempfile.TemporaryDirectory() as folder:
        settings = {"kernel": "tangent", "ledger": folder, **SCHEMES[piece.part]}
        with Attributor(model, optimizer, turns(study, data), loss, **settings) as attributor:
            for step in range(study.steps):
                if step % every == 0:
                    losses.append([mean_loss_of(model, of) for of in data.targets.values()])
                set_rate(study, optimizer, step)
                places = places_of(study, step)
                with attributor.batch(range(places.start, places.stop)):
                    loss(model, data.blocks[places]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        ledger = Ledger(folder)
        values = [ledger.values(name).sort("id")["value"].to_numpy() for name in study.targets]
    losses.append([mean_loss_of(model, of) for of in data.targets.values()])
    return {
        "values": np.array(values).reshape(len(study.targets), study.steps, study.batch),
        "source": data.source.reshape(study.steps, study.batch), "loss": np.array(losses).T,
        "weights": hash_of(model),
    }  # fmt: skip


def proxies(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """The same run; `values`: rate times <g_i, grad L>, g_i of the batch's mean, as if the optimizer were SGD."""
    data, model = data_of(study, text, piece), model_of(study, piece.seed)
    optimizer, targets = optimizer_of(study, model), turns(study, data)
    values = np.empty((len(targets), study.steps, study.batch))

    def one(weights: Weights, block: Tensor) -> Tensor:
        return example_losses(lambda ids: functional_call(model, weights, (ids,)), block[None])[0]  # type: ignore[arg-type]

    for step in range(study.steps):
        rate = set_rate(study, optimizer, step)
        blocks = data.blocks[places_of(study, step)]
        batches = [(of[step % len(of)],) for of in targets.values()]
        found = baselines.products(baselines.weights_of(model), one, (blocks,), batches)
        values[:, step] = rate / study.batch * found
        train_step(model, optimizer, blocks)
    source = data.source.reshape(study.steps, study.batch)
    return {"values": values, "source": source, "weights": hash_of(model)}


def without_sources(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """Every window of the run once more from its own beginning, without one source: batches are of the others alone.
    At last without as many random blocks.

    Returns:
        `worse` [windows, sources + 1, targets]: how much higher the target's loss is at the window's end than in the
        run, in nats; `nearness` [sources, targets]: of `bigram_loss`; `weights`: the hash of the run's at the end.
    """
    data, mixture = data_of(study, text, piece), study.mixture(piece.mixture)
    model = model_of(study, piece.seed)
    optimizer, length = optimizer_of(study, model), study.steps // study.windows
    worse = np.empty((study.windows, len(mixture) + 1, len(study.targets)))
    random = np.random.default_rng([piece.seed, 1]).permutation(data.source)
    left_out = [*(data.source == k for k in range(len(mixture))), random == 0]
    for window in range(study.windows):
        steps = range(window * length, (window + 1) * length)
        for k, without in enumerate(left_out):
            other = deepcopy(model)
            its = optimizer_of(study, other)
            its.load_state_dict(deepcopy(optimizer.state_dict()))
            for step in steps:
                set_rate(study, its, step)
                places = places_of(study, step)
                train_step(other, its, data.blocks[places][torch.from_numpy(~without[places])])
            worse[window, k] = [mean_loss_of(other, of) for of in data.targets.values()]
        for step in steps:
            set_rate(study, optimizer, step)
            train_step(model, optimizer, data.blocks[places_of(study, step)])
        worse[window] -= [mean_loss_of(model, of) for of in data.targets.values()]
    near = [[bigram_loss(study, data.blocks[torch.from_numpy(data.source == k)], of) for of in data.targets.values()]
            for k in range(len(mixture))]  # fmt: skip
    return {"worse": worse, "nearness": np.array(near), "weights": hash_of(model)}


def bigram_loss(study: Study, train_NT: Tensor, held_out_NT: Tensor) -> float:
    """Nats per token of the held-out blocks by the pairs of tokens of others: how near these are, by no network."""
    vocabulary = study.vocabulary
    single = torch.bincount(train_NT.flatten(), minlength=vocabulary) + 1.0
    pairs = torch.bincount((train_NT[:, :-1] * vocabulary + train_NT[:, 1:]).flatten(), minlength=vocabulary**2)
    pairs = pairs.view(vocabulary, vocabulary)
    before, after = held_out_NT[:, :-1].flatten(), held_out_NT[:, 1:].flatten()
    likely = (pairs[before, after] + PSEUDO * (single / single.sum())[after]) / (pairs.sum(dim=1)[before] + PSEUDO)
    return float(-likely.log().mean())
