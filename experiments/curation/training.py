"""The training, the values of the run itself and of its replay, and training again on a part of the blocks."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.curation.config import ALL, Piece, Study
from experiments.curation.mixture import Indices, data_of
from experiments.language import loss, mean_loss_of, model_of, optimizer_of, set_rate, train_step
from experiments.pieces import hash_of
from experiments.values import NORMALISED, by_epoch, totals
from inrun import Attributor, Ledger, replay

WIDE = "at once"
OTHER = 1000  # what is added to a seed where a model begins with other weights than the run's, in another order


def valued(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """The run with an Attributor, as in a user's loop; for `path` also its replay.

    Returns:
        For `path`: `path, TARGET` [epochs, N] for every target, in nats; `path, by step`, of the main one; `replay`
        [N]. For `first` the same of the main target, with no replay. For `wide` only `path, at once`: every step has
        all blocks of the main target. `kind` [N]; `step` [epochs, N] of a block's use; `target` [2]: the main one's
        loss before and after; `weights`: their hash at the end.
    """
    data, model = data_of(study, text, piece.seed), model_of(study, piece.seed)
    optimizer, found = optimizer_of(study, model), dict[str, Any]()
    targets: dict[str, Any] = {study.main: data.targets[study.main]}
    if piece.part == "path":
        targets = dict(data.targets)
    elif piece.part == "wide":
        targets = {WIDE: data.whole}
    scheme: Any = "first" if piece.part == "first" else "path"
    before, replayable = mean_loss_of(model, data.whole), piece.part == "path"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Attributor(
            model, optimizer, targets, loss, scheme=scheme, kernel="tangent", ledger=folder, replayable=replayable
        ) as attributor:
            for step, (_, places) in enumerate(data.steps(study)):
                set_rate(study, optimizer, step)
                blocks = data.blocks[places]
                with attributor.batch(places, data=blocks if replayable else None):
                    loss(model, blocks).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        sizes = (study.blocks, study.epochs, study.steps)
        for target in targets:
            found[f"{scheme}, {target}"] = by_epoch(Ledger(folder), target, *sizes)
        if WIDE not in targets:
            found[scheme + NORMALISED] = by_epoch(Ledger(folder), study.main, *sizes, normalised=True)
        if replayable:
            values = replay(
                folder, {study.main: data.targets[study.main]}, loss, model=model, optimizer=optimizer,
                progress=lambda done, steps, now: None,
            )  # fmt: skip
            found["replay"] = totals(values, study.blocks)
    before_epoch = study.steps // study.epochs * np.arange(study.epochs)[:, None]
    return found | {
        "kind": data.kind, "step": before_epoch + np.argsort(data.orders, axis=1) // study.batch,
        "target": np.array([before, mean_loss_of(model, data.whole)]), "weights": hash_of(model),
    }  # fmt: skip


def order_of(study: Study, kept: NDArray[np.bool_], seed: int) -> Iterator[Indices]:
    """Batches of the blocks that are kept, again and again in another order, for as many steps as the run has.

    Of the same seed, those that are kept come in the same order whatever else is kept.
    """
    random, waiting = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    for _ in range(study.steps):
        while len(waiting) < study.batch:
            order = random.permutation(study.blocks)
            waiting = np.concatenate([waiting, order[kept[order]]])
        yield waiting[: study.batch]
        waiting = waiting[study.batch :]


def trained_again(study: Study, text: Path, piece: Piece, kept: NDArray[np.bool_]) -> dict[str, Any]:
    """Plain training on the blocks that are kept, for as many steps, from other weights and in another order.

    Returns:
        `curve` [tests]: the test loss, before the first step and after every `every`; `sources` [clean sources]: the
        loss at the end on each; `kept` [N].
    """
    data, seed = data_of(study, text, piece.seed), piece.seed + OTHER * (2 if piece.part == f"{ALL} again" else 1)
    model = model_of(study, seed)
    optimizer, curve = optimizer_of(study, model), [mean_loss_of(model, data.tested)]
    for step, places in enumerate(order_of(study, kept, seed)):
        set_rate(study, optimizer, step)
        train_step(model, optimizer, data.blocks[places])
        if (step + 1) % study.every == 0:
            curve.append(mean_loss_of(model, data.tested))
    assert study.steps % study.every == 0
    each = [mean_loss_of(model, data.tested_each[source]) for source in study.clean]
    return {"curve": np.array(curve), "sources": np.array(each), "kept": kept}
