"""`inrun replay`: a run of `inrun train` gone back through, for its own targets or others."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from inrun.integrations.transformers import model_loss, replay
from inrun.ledger import Ledger
from inrun.lm.config import CONFIG, ConfigError, Train
from inrun.lm.documents import read_documents
from inrun.lm.place import folder_name, held
from inrun.lm.tokens import TokenStore, build, fixed_batches, load_tokenizer
from inrun.lm.train import model_of, quiet, trainer_of
from inrun.replaying.passes import Hessian
from inrun.replaying.record import Record
from inrun.replaying.store import place_of
from inrun.replaying.walk import Progress
from inrun.target import Loss


def replay_run(
    run: Path,
    targets: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    *,
    horizon: float | None = None,
    hessian: Hessian = "auto",
    memory: int | Literal["auto"] = "auto",
    progress: Progress | None = None,
) -> Ledger:
    """`inrun.replay` of a run of `inrun train`, whose model, data and tokenizer stand in its folder.

    Args:
        targets: name -> a file of text (what `inrun train --target` takes), or batches of tokens; None: the run's own.

    Raises ConfigError for a folder that holds no such run, and a target of another text than that of its name.
    """
    config = Train.stored(run)
    if config is None:
        raise ConfigError(
            f"{run} holds no run of `inrun train` (no {CONFIG}): replay it from Python, with inrun.replay(run, ..., "
            "model=, optimizer=), or inrun.integrations.transformers.replay(trainer, run, ...)."
        )
    Record(run)  # says so where it was not recorded
    quiet()
    with held(run):
        config, tokenizer = replace(config, out=run), load_tokenizer(run / "tokenizer")
        own = _stores(run / "targets")
        given = dict.fromkeys(own) if targets is None else targets
        batches = {name: _batches(config, tokenizer, name, of, own.get(name)) for name, of in given.items()}
        trainer = trainer_of(config, model_of(config, tokenizer), TokenStore(run / "tokens"))
        return replay(
            trainer,
            run,
            batches,
            loss=loss or model_loss,
            horizon=horizon,
            hessian=hessian,
            memory=memory,
            progress=progress,
        )


def _stores(folder: Path) -> dict[str, TokenStore]:
    """The tokens of targets, by name."""
    places = [place for place in folder.iterdir() if not place.name.startswith(".")] if folder.exists() else []
    return {store.meta["settings"]["target"]: store for store in map(TokenStore, places)}


def _batches(config: Train, tokenizer: PreTrainedTokenizerFast, name: str, given: Any, own: TokenStore | None) -> Any:
    """A target's batches: of the run's own tokens, of a file's text, or as they are given."""
    if given is not None and not isinstance(given, str | PathLike):
        return given
    store = own
    if given is not None:
        if own is not None:
            raise ConfigError(
                f"--target {name}={given}: the run has a target of this name: name this one otherwise, or leave out "
                "--target to replay the run's own."
            )
        documents = read_documents(
            str(given), text_column=config.text_column, id_column=config.id_column, split=config.split
        )
        sequence = int(TokenStore(config.out / "tokens").meta["sequence"])
        place = place_of(config.out) / "targets" / folder_name(name)
        shutil.rmtree(place, ignore_errors=True)
        store = build(documents, tokenizer, place, sequence=sequence, settings={"target": name})
    assert store is not None
    return fixed_batches(store, config.target_batch, config.target_examples)
