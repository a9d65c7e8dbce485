"""The examples of every model: digits with wrong labels, and rows of tokens of real text from several domains.

An example is its inputs and labels: features [D] and a class, or tokens [T] and the ones that follow them [T].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.counterfactual.config import Model, Study
from experiments.facts import training as facts
from experiments.replay import training as replay
from experiments.retraining import Batch

MADE_UP = "made up"
OWN = 8  # of so many documents one is kept for targets
Rows = NDArray[np.int64]  # [rows, T + 1]


@dataclass(frozen=True)
class Data:
    """A seed's training set and target; `group` [N]: whether an example is of the target's domain, or has its right
    label.
    """

    train: Batch
    target: Batch
    group: NDArray[np.bool_]


def write_text(study: Study, path: Path) -> None:
    """The rows of tokens of every text model and source, of its documents that are and are not for targets, in a file:
    `MODEL, SOURCE, train` and `MODEL, SOURCE, target` [rows, T + 1].
    """
    found: dict[str, Rows] = {}
    for model in study.models:
        if model.kind != "mlp":
            for name, rows in rows_of(model, study.characters):
                found[f"{model.name}, {name}"] = rows
    draft = path.with_name(f".{path.name}.partial.npz")
    np.savez(draft, **found)  # type: ignore[arg-type]
    draft.replace(path)


def rows_of(model: Model, characters: int) -> Iterator[tuple[str, Rows]]:
    if model.sources[0].startswith(MADE_UP):
        for source in model.sources:
            chains = made_up(model, int(source.removeprefix(MADE_UP)))
            yield f"{source}, train", chains[: model.examples]
            yield f"{source}, target", chains[model.examples :]
        return
    from inrun.lm.sources import demo_mixture  # slow to import, and needed once

    documents = {s: [d.text for d in demo_mixture(characters, names=(s,))] for s in model.sources}
    encode = tokenizer_of(model, [text for texts in documents.values() for text in texts])
    for source, texts in documents.items():
        for part, mine in (("train", [t for k, t in enumerate(texts) if k % OWN]), ("target", texts[::OWN])):
            yield f"{source}, {part}", np.concatenate([cut(ids, model.length + 1) for ids in encode(mine)])


def tokenizer_of(model: Model, texts: list[str]) -> Any:
    """encode(texts) -> tokens of each: SmolLM2's, or one of the model's size, learnt of these texts."""
    from inrun.lm.tokens import train_tokenizer

    lora = model.kind == "lora"
    given = facts.tokenizer_of(facts.Study()) if lora else train_tokenizer(texts, model.vocabulary)
    return lambda of: given(of, add_special_tokens=False)["input_ids"]


def cut(tokens: list[int], length: int) -> Rows:
    """Whole rows of a document; its end is left out."""
    rows = len(tokens) // length
    return np.array(tokens[: rows * length], dtype=np.int64).reshape(rows, length)


def made_up(model: Model, kind: int) -> Rows:
    """Chains in which one token decides what the next may be, each kind by a table of its own."""
    random = np.random.default_rng(kind)
    follow = random.dirichlet(np.full(model.vocabulary, 0.05), size=model.vocabulary)
    rows = np.zeros((model.examples + model.held_out, model.length + 1), dtype=np.int64)
    for row in rows:
        for k in range(len(row)):
            row[k] = random.choice(model.vocabulary, p=follow[row[k - 1]])
    return rows


def digits(model: Model, seed: int) -> Data:
    """Those of experiments/replay, with the same wrong labels."""
    given = replay.Data(
        replay.Study(
            source=model.sources[0], examples=model.examples, held_out=model.held_out, wrong=model.wrong,
            batch=model.batch, epochs=model.epochs,
        ),
        seed, torch.float32,
    )  # fmt: skip
    return Data((given.x, given.y), given.target, ~given.wrong.numpy())


def text(model: Model, seed: int, path: Path) -> Data:
    """Equal shares of every source, and of the target's source rows of other documents."""
    random, share = np.random.default_rng(seed), model.examples // len(model.sources)
    with np.load(path) as arrays:
        rows = {name: arrays[f"{model.name}, {name}, train"] for name in model.sources}
        held_out = arrays[f"{model.name}, {model.target}, target"]
    chosen = [of[random.choice(len(of), share, replace=False)] for of in rows.values()]
    group = np.repeat([name == model.target for name in rows], share)
    target = held_out[random.choice(len(held_out), model.held_out, replace=False)]
    return Data(pairs(np.concatenate(chosen)), pairs(target), group)


def pairs(rows: Rows) -> Batch:
    tokens = torch.from_numpy(rows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def data_of(model: Model, seed: int, path: Path) -> Data:
    of = digits if model.kind == "mlp" else partial(text, path=path)
    return of(model, seed)
