"""`inrun train`: text to tokens to model to Trainer, with every example valued on the way.

A run's folder holds its configuration, the tokenizer, the tokens (of the text and of every target), the Trainer's
checkpoints, the ledger and, at the end, the model. Each is written whole or not at all, so that a run killed at any
moment goes on with `--resume` and ends with the same ledger as one that was not.
"""

import errno
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainingArguments

from inrun.direction import scheme_of
from inrun.errors import InrunError
from inrun.integrations.transformers import attach, last_checkpoint
from inrun.ledger import LedgerError, write_examples
from inrun.lm.config import CONFIG, ConfigError, Train
from inrun.lm.documents import Document, check_ids, read_documents
from inrun.lm.held_out import held_out_ids
from inrun.lm.place import RUN, folder_name, forget, held, held_already
from inrun.lm.presets import PRESETS, Preset, build_model
from inrun.lm.progress import ProgressCallback
from inrun.lm.tokens import (
    Collate,
    TokenStore,
    build,
    fingerprint,
    fixed_batches,
    load_tokenizer,
    train_tokenizer,
)
from inrun.replaying.recording import Recording
from inrun.report import one_line

_WRITING = re.compile("I/O error|PytorchStreamWriter|inline_container")
TOKENIZER_DOCUMENTS = 20_000  # a tokenizer is trained on the first of them


class TrainError(InrunError):
    """A run that broke off on its way: the message says why and how it goes on."""


def train(config: Train, console: Console) -> Path:
    """Carry out a run, or the rest of one, and return its folder.

    Raises InrunError for options, text, models and folders that cannot be used, and where the disk refuses.
    """
    run = config.out
    with held(run):
        config, fresh = _begin(config)
        resume = f"inrun train --out {shlex.quote(str(run))} --resume"
        try:
            _carry_out(config, console)
        except KeyboardInterrupt:
            console.print(f"interrupted; go on with: {resume}", highlight=False, soft_wrap=True)
            raise
        except SystemExit:  # what rich makes of a closed pipe
            print(f"inrun train: nobody reads the output any more; go on with: {resume}", file=sys.stderr)
            raise
        except Exception as error:
            if fresh and not (run / RUN).exists():
                forget(run)  # the mended command finds the folder as this one found it
            if not _disk_refused(error):
                raise
            raise TrainError(
                f"{run}: the run's files could not be written ({_brief(error)}). Free space or correct the folder's "
                f"rights, then {f'go on with: {resume}' if (run / CONFIG).exists() else 'begin again'}"
            ) from error
    console.print(f"values: {run}; see them with: inrun report {run}", highlight=False, soft_wrap=True)
    return run


def _carry_out(config: Train, console: Console) -> None:
    run, preset = config.out, preset_of(config)
    quiet()
    sequence = config.sequence or preset.sequence
    tokenizer = _tokenizer(config, preset.vocab_size, console)
    model = model_of(config, tokenizer)
    text, targets = _tokens(config, tokenizer, sequence, console)
    steps = _steps(config, preset, len(text))
    _say(console, config, model, text, targets, steps)
    write_examples(run, text.examples(tokenizer if config.token_values else None))
    checkpoint = last_checkpoint(run / "checkpoints")
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    if checkpoint is not None and done >= steps:
        # all steps are done: a Trainer resumed here would take one more
        model = build_model(str(checkpoint), len(tokenizer), sequence)
    else:
        _train(config, model, text, targets, checkpoint, console)
    model.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")


def quiet() -> None:
    """transformers is, beside our own lines."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def preset_of(config: Train) -> Preset:
    """The model's, or what stands for one where the model is a folder or a configuration."""
    return PRESETS.get(config.model, Preset("", PRESETS["tiny"].architecture, sequence=1024, vocab_size=32_000))


def model_of(config: Train, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model as the run begins with it."""
    torch.manual_seed(config.seed)
    sequence = config.sequence or preset_of(config).sequence
    return build_model(config.model, len(tokenizer), sequence, eos=tokenizer.eos_token_id)


def trainer_of(config: Train, model: PreTrainedModel, text: TokenStore) -> Trainer:
    """The run's Trainer."""
    preset = preset_of(config)
    arguments = _arguments(config, preset, _steps(config, preset, len(text)))
    trainer = Trainer(model=model, args=arguments, train_dataset=text, data_collator=Collate(text.pad))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _disk_refused(error: Exception) -> bool:
    """Whether a file could not be written; safetensors and torch say so in errors of their own."""
    if isinstance(error, LedgerError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
    return isinstance(error, SafetensorError | RuntimeError) and bool(_WRITING.search(str(error)))


def _brief(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


def _train(
    config: Train,
    model: PreTrainedModel,
    text: TokenStore,
    targets: dict[str, TokenStore],
    checkpoint: Path | None,
    console: Console,
) -> None:
    """The steps from the checkpoint on, or from the beginning."""
    trainer = trainer_of(config, model, text)
    batches = {
        name: fixed_batches(store, config.target_batch, config.target_examples) for name, store in targets.items()
    }
    attached = attach(
        trainer,
        batches,
        ledger=config.out,
        resume=True,  # the folder was found to be this run's, or new, by _begin
        scheme=config.scheme,
        nodes=config.nodes,
        rule=config.rule,
        tolerance=config.tolerance,
        max_nodes=config.max_nodes,
        refresh=config.refresh,
        momentum=config.momentum,
        kernel=config.kernel,
        token_values=config.token_values,
        memory=config.memory,
        audit_every=config.audit_every,
        audit_permutations=config.audit_permutations,
        nonfinite=config.nonfinite,
        replayable=config.replayable and Recording(every=config.replay_every, disk=config.replay_disk),
    )
    progress = ProgressCallback(attached, console)
    trainer.add_callback(progress)
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint.name}", highlight=False)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        progress.stop()


def _begin(config: Train) -> tuple[Train, bool]:
    """Check options and folder, and keep the configuration there; the stored one, and False, if a run is resumed."""
    resumed = config.resume
    if resumed:
        config = config.continued()
    fresh = not (config.out / CONFIG).exists()
    there = held_already(config.out)
    if there is not None and (fresh or not resumed):
        raise ConfigError(
            f"{config.out} already holds a run ({there}): choose another folder with --out"
            + ("." if fresh else ", or add --resume.")
        )
    if not config.data:
        raise ConfigError("no text to train on: give one or more files, folders or `datasets` names.")
    if not config.target and config.target_from is None:
        raise ConfigError(
            "no target: name a text to value the examples for, as --target math=math.jsonl, or hold a share of every "
            "group of a column out, as --target-from domain."
        )
    if config.steps is not None and config.epochs is not None:
        raise ConfigError("--steps and --epochs were both given: give one of them.")
    config.check_numbers()
    scheme_of(config.scheme, config.nodes, config.rule, config.tolerance, config.max_nodes, config.refresh)
    if config.momentum == "credit" and (config.audit_permutations or config.nonfinite == "skip" or config.refresh != 1):
        raise ConfigError("--momentum credit goes with none of --audit-permutations, --nonfinite skip, --refresh.")
    if config.replayable and (config.kernel == "perexample" or config.nonfinite == "skip"):
        raise ConfigError("--replayable goes neither with --kernel perexample nor with --nonfinite skip.")
    if config.kernel == "ghost":
        raise ConfigError("--kernel ghost is for SGD, and `inrun train` trains with AdamW: choose another.")
    _target_files(config)
    config.store()
    return config, fresh


def _target_files(config: Train) -> dict[str, str]:
    files: dict[str, str] = {}
    for given in config.target:
        name, sign, path = given.partition("=")
        if not (name and sign and path) or name in files or Path(name).name != name:
            raise ConfigError(f"--target {given!r}: give each target once, as NAME=FILE, with a plain name.")
        files[name] = path
    return files


def _documents(config: Train, path: str) -> Iterator[Document]:
    return read_documents(path, text_column=config.text_column, id_column=config.id_column, split=config.split)


def _tokenizer(config: Train, vocab_size: int, console: Console) -> PreTrainedTokenizerFast:
    """The run's tokenizer: as stored with it, as named, the pretrained model's, or trained on the text."""
    stored = config.out / "tokenizer"
    if not stored.exists():
        source = config.tokenizer or Path(config.model).expanduser()
        if config.tokenizer is not None or (config.model not in PRESETS and (source / "tokenizer.json").exists()):
            tokenizer = load_tokenizer(source)
        else:
            size = config.vocab_size or vocab_size
            console.print(f"training a tokenizer of {size} tokens", highlight=False)
            documents = chain.from_iterable(_documents(config, path) for path in config.data)
            texts = (document.text for document in islice(documents, TOKENIZER_DOCUMENTS))
            tokenizer = train_tokenizer(texts, size)
        draft = config.out / ".tokenizer"
        shutil.rmtree(draft, ignore_errors=True)
        tokenizer.save_pretrained(draft)
        os.replace(draft, stored)
    return load_tokenizer(stored)


def _tokens(
    config: Train, tokenizer: PreTrainedTokenizerFast, sequence: int, console: Console
) -> tuple[TokenStore, dict[str, TokenStore]]:
    """The tokens of the text to train on and of every target, made once and found again by a resumed run."""
    files = _target_files(config)
    tokens, places = config.out / "tokens", config.out / "targets"
    if tokens.exists():  # made last: all are there, and the text may have moved since
        stores = [TokenStore(place) for place in places.iterdir() if not place.name.startswith(".")]
        of = {store.meta["settings"]["target"]: store for store in stores}
        found = TokenStore(tokens)
        for one in (found, *stores):
            if one.meta["fingerprint"] != fingerprint(tokenizer, sequence=sequence, settings=one.meta["settings"]):
                raise ConfigError(
                    f"{one.folder}: tokens of another tokenizer or sequence; choose another folder for this run."
                )
        return found, {name: of[name] for name in [*sorted(of.keys() - files), *files]}

    def text() -> Iterator[Document]:
        return chain.from_iterable(_documents(config, path) for path in config.data)

    held: dict[str, str] = {}
    if config.target_from is not None:
        held = held_out_ids(check_ids(text()), config.target_from, config.target_share, config.seed)
    groups = sorted(set(held.values()))
    twice = [name for name in files if name in groups]
    if twice:
        raise ConfigError(f"--target {twice[0]}: a group of {config.target_from} is a target of this name already.")

    def tokenized(place: Path, what: str, documents: Iterator[Document], settings: dict[str, Any]) -> TokenStore:
        console.print(f"tokenizing {what}", highlight=False, soft_wrap=True, markup=False)
        return build(documents, tokenizer, place, sequence=sequence, settings=settings)

    shutil.rmtree(places, ignore_errors=True)  # of a run killed before all were there
    of_groups = {name: _of_group(text(), held, name) for name in groups}
    of_files = {name: _documents(config, path) for name, path in files.items()}
    targets = {
        name: tokenized(places / folder_name(name), f"target {one_line(name, 60)}", documents, {"target": name})
        for name, documents in {**of_groups, **of_files}.items()
    }
    kept = (document for document in text() if document.id not in held)
    settings = {"data": list(config.data), "from": config.target_from, "share": config.target_share}
    return tokenized(tokens, "the text", kept, settings), targets


def _of_group(documents: Iterator[Document], held: dict[str, str], group: str) -> Iterator[Document]:
    return (document for document in documents if held.get(document.id) == group)


def _steps(config: Train, preset: Preset, examples: int) -> int:
    if config.epochs is not None:
        return max(1, math.ceil(config.epochs * examples / ((config.batch or preset.batch) * config.accumulation)))
    return config.steps or preset.steps


def _arguments(config: Train, preset: Preset, steps: int) -> TrainingArguments:
    def chosen(name: str) -> Any:
        given = getattr(config, name)
        return getattr(preset, name) if given is None else given

    return TrainingArguments(
        output_dir=str(config.out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=chosen("batch"),
        gradient_accumulation_steps=config.accumulation,
        optim="adamw_torch",
        learning_rate=chosen("learning_rate"),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": min(chosen("min_learning_rate"), chosen("learning_rate"))},
        warmup_steps=min(preset.warmup_steps, steps // 2) if config.warmup_steps is None else config.warmup_steps,
        adam_beta1=preset.betas[0],
        adam_beta2=preset.betas[1],
        weight_decay=chosen("weight_decay"),
        max_grad_norm=chosen("clip"),
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=config.save_every,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
    )


def _say(
    console: Console, config: Train, model: Any, text: TokenStore, targets: dict[str, TokenStore], steps: int
) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{config.model}: {parameters:,} parameters; {len(text):,} examples of {text.meta['documents']:,} documents, "
        f"{text.meta['tokens']:,} tokens; {steps:,} steps; targets: "
        + ", ".join(
            f"{one_line(name, 60)} ({min(len(store), config.target_examples)} examples)"
            for name, store in targets.items()
        ),
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
