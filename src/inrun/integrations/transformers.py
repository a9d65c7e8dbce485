"""Hugging Face's Trainer: `attach(trainer, targets=..., ledger=...)` before `trainer.train()`.

Ids travel in a column of the training examples: past the Trainer's pruning of columns, around the collator (which never
sees them), and off the batch again before the model is called. Evaluation and prediction are left as they are.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from inrun.attributor import Attributor
from inrun.errors import InrunError
from inrun.integrations.books import Books
from inrun.integrations.ids import CollateWithIds
from inrun.integrations.replayed import Replay, Replayed, batches_of, optimizer_of, recorded, recording_of
from inrun.integrations.replayed import model_loss as model_loss
from inrun.integrations.sft import check_attention, head_called, packed_with_ids, packs, shifted
from inrun.ledger import Ledger
from inrun.packed import as_packed
from inrun.step import as_ids
from inrun.target import Loss

MARK = "inrun.json"
STATE = "inrun.safetensors"
_TENSOR = "tensor in inrun.safetensors"
_ABSENT = object()


def attach(
    trainer: Trainer,
    targets: Mapping[str, Any],
    *,
    id_column: str = "id",
    ledger: str | PathLike[str] | None = None,
    loss: Loss = model_loss,
    resume: bool | None = None,
    train_dataset: Any = None,
    **settings: Any,
) -> "InrunCallback":
    """Value every training example of a Trainer's next run. Call it before `trainer.train()`.

    Works on any subclass, whatever it overrides: the batch that it trains on must come from the trainer's own collator,
    or have the ids in `id_column`. Examples may be packed: what has an id for every token is valued document by
    document (docs/parts.md). That is

    * examples with a list of ids in `id_column`, one for every token, also of different lengths, where the collator
      returns an attention_mask that tells padding from tokens;
    * examples with one id, which the collator puts one after the other into one row (padding_free);
    * what trl's SFTTrainer packs (packing=True, with any strategy), given `train_dataset`.

    Values and books go into what the trainer logs for its steps (not for evaluation), and so to all that it reports to:
    `inrun/TARGET/value`, the sum of the values since the last log, `inrun/TARGET/loss`, the target's loss where its
    gradient was last taken, both in nats, `inrun/conservation`, the largest relative error of the books' first check;
    and for audited steps the sums since the last log of `inrun/TARGET/unexplained`, `momentum` and `decay`, in nats.
    Under momentum="credit" a step's are logged when they are final; those that training's end makes final are in the
    ledger alone.

    Args:
        trainer: any Trainer whose training examples have an id in `id_column` (ints or strings). It may be one of
            several processes, as torchrun or accelerate starts them (DistributedDataParallel, or FSDP of version 2);
            each has the whole of every target.
        targets: name -> what `inrun.Attributor` takes, or a dataset, batched by the trainer's own collator at its
            evaluation batch size and used in rotation. An SFTTrainer's may be as its own data are: conversational, with
            prompt and completion, of text, or tokenized.
        ledger: the folder for the values. It is flushed before every checkpoint of the trainer.
        loss: a target batch's mean loss; by default the one that the model returns.
        resume: whether the ledger's folder may hold this run already; by default, whether the trainer resumes from a
            checkpoint. The ledger is then cut back to the checkpoint's step.
        train_dataset: of an SFTTrainer that packs, the dataset that it was built with, with an id for every document:
            its packing keeps no column but tokens and labels. It is packed once more, in the same way, with the ids.
        settings: the other arguments of `inrun.Attributor`. With `replayable=`, clipping and loss scaling are the
            trainer's.

    Returns:
        The callback; its `attributor` is there from the beginning of training on, and closed at its end.

    Raises:
        InrunError: DataParallel, auto_find_batch_size, a trainer that is attached already, a dataset without the
            column of ids, or another than the one that was packed.
    """
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, InrunCallback):
            if not callback.done:
                raise InrunError("this trainer is attached already: call detach() on what attach() returned.")
            trainer.remove_callback(callback)
    check_attention(trainer)
    packed = _packed(trainer, train_dataset, id_column)
    callback = InrunCallback(trainer, targets, id_column, dict(ledger=ledger, loss=loss, **settings), resume, packed)
    trainer.add_callback(callback)
    return callback


def replay(
    trainer: Trainer,
    run: str | PathLike[str],
    targets: Mapping[str, Any],
    *,
    id_column: str = "id",
    loss: Loss = model_loss,
    **settings: Any,
) -> Ledger:
    """Go back through a run that a Trainer made under `attach(..., ledger=run, replayable=True)`: `inrun.replay` with
    the trainer's model, optimizer and loss.

    Args:
        trainer: built as for the run, and not attached; it trains nothing.
        run: the ledger's folder.
        targets, loss, id_column: as for `attach`.
        settings: the other arguments of `inrun.replay`: horizon, hessian, memory, progress.

    Raises what `inrun.replay` raises.
    """
    callback = Replay(trainer, run, targets, id_column, loss, settings)
    trainer.add_callback(callback)
    try:
        trainer.train()
    except Replayed as done:
        return done.ledger
    finally:
        trainer.is_in_train = False
        trainer.remove_callback(callback)
    raise InrunError("the trainer began no training, in which a replay is done: see what it printed.")


def _packed(trainer: Trainer, given: Any, id_column: str) -> Any:
    """The data to train on in place of the trainer's, None for its own. Raises InrunError if it is seen to lack ids."""
    if given is not None:
        if not packs(trainer):
            raise InrunError("train_dataset= is for an SFTTrainer that packs (packing=True): leave it out.")
        return packed_with_ids(trainer, given, id_column)
    columns = getattr(trainer.train_dataset, "column_names", None)
    if columns is None or id_column in columns:
        return None
    if packs(trainer):
        raise InrunError(
            f"SFTTrainer's packing dropped the {id_column!r} column: give attach() train_dataset=, the dataset that "
            "the trainer was built with, with an id for every document."
        )
    raise InrunError(
        f"the training dataset has no {id_column!r} column (it has {', '.join(columns)}): add one, with an int or a "
        "string for every example, or name another with id_column=."
    )


class InrunCallback(TrainerCallback):
    """Opens the attributor when training begins, marks its batches, and closes it when training ends.

    `done`: training has ended, or it was detached.
    """

    def __init__(
        self,
        trainer: Any,
        targets: Mapping[str, Any],
        id_column: str,
        settings: dict[str, Any],
        resume: bool | None,
        train_dataset: Any = None,
    ) -> None:
        if trainer.args.n_gpu > 1:
            raise InrunError(
                "the Trainer would copy the model to several devices at every step (DataParallel): start it with "
                "torchrun, a process for each, or let it see one of them."
            )
        if trainer.args.auto_find_batch_size:
            raise InrunError("auto_find_batch_size=True begins a run anew, with what it had booked: give a batch size.")
        self.attributor: Attributor | None = None
        self.done = False
        self._trainer, self._targets, self._id_column = trainer, targets, id_column
        self._settings, self._resume = settings, resume
        self._books = Books()
        self._shifts = False
        self._inside = ExitStack()
        # on the instance, so that any subclass keeps its own; taken off again by `detach`
        self._training_step, self._get_train_dataloader = trainer.training_step, trainer.get_train_dataloader
        self._log = trainer.log
        ours = {
            "training_step": self._attributed_step,
            "get_train_dataloader": self._dataloader_with_ids,
            "log": self._log_with_books,
            **({} if train_dataset is None else {"train_dataset": train_dataset}),
        }
        self._were = {name: vars(trainer).get(name, _ABSENT) for name in ours}
        vars(trainer).update(ours)

    def detach(self) -> None:
        """Leave the trainer, and the model and optimizer, as they were."""
        if not self.done:
            for name, was in self._were.items():
                if was is _ABSENT:
                    vars(self._trainer).pop(name, None)
                else:
                    vars(self._trainer)[name] = was
        self.done = True
        self._inside.close()
        if self.attributor is not None:
            self.attributor.detach()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.done:
            raise InrunError(
                "attach() values one run, and this trainer's has ended: call it again, with a ledger of its own, or "
                "trainer.remove_callback() with what it returned."
            )
        self._end()  # of a run that broke off, and goes on
        try:
            self._begin(args, state)
        except BaseException:
            self.detach()
            raise

    def _begin(self, args: TrainingArguments, state: TrainerState) -> None:
        trainer = self._trainer
        optimizer = optimizer_of(trainer)
        resume = state.global_step > 0 if self._resume is None else self._resume
        targets = batches_of(trainer, self._targets, self._id_column)
        self._shifts, self._books = self._inside.enter_context(head_called(trainer)), Books()
        model = trainer.model if args.world_size == 1 else trainer.model_wrapped
        settings = {**self._settings, "replayable": recording_of(trainer, self._settings.get("replayable", False))}
        self.attributor = Attributor(model, optimizer, targets, resume=resume, **settings)
        if resume:
            self.attributor.load_state_dict(_stored_state(_checkpoint(args, state), state.global_step))

    def _end(self) -> None:
        """Take the attributor off, and leave to its ledger what it has booked."""
        self._inside.close()
        if self.attributor is not None:
            self.attributor.discard()
            self.attributor.close()
            self.attributor = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.attributor is None:
            return
        if self._trainer.accelerator.optimizer_step_was_skipped:  # by a gradient scaler: these batches moved nothing
            self.attributor.discard()
        self._books.add(self.attributor)
        if control.should_save:  # the ledger must not be behind the checkpoint that is about to be written
            self.attributor.flush()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_step_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the attributor's state into the checkpoint, and mark it as whole: a killed process may leave half."""
        folder = _checkpoint(args, state)
        tensors: list[Tensor] = []
        mark = {"step": state.global_step}
        if self.attributor is not None:  # whose steps are fewer than the trainer's where a scaler left some out
            mark = _without_tensors(self.attributor.state_dict(), tensors)
        if not state.is_world_process_zero:  # all have written their own by now: state_dict() waits for them
            return
        if tensors:
            save_file({str(k): x.contiguous() for k, x in enumerate(tensors)}, folder / STATE)
        temporary = folder / f".{MARK}"
        temporary.write_text(json.dumps(mark))
        os.replace(temporary, folder / MARK)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.detach()
        if self.attributor is not None:
            self.attributor.flush()  # of all processes, before any of them goes on
            self.attributor.close()

    def _attributed_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.attributor is None:
            raise InrunError("training began without on_train_begin: call trainer.train(), not training_step().")
        if self._id_column not in inputs:
            raise InrunError(
                f"a batch came without {self._id_column!r} (it has {', '.join(map(str, inputs))}): the training data "
                "loader does not use trainer.data_collator as it is when get_train_dataloader() is called. Let its own "
                "collate_fn return the ids of its examples, a list in this column."
            )
        ids, mask = inputs.pop(self._id_column), inputs.get("attention_mask")
        if (
            self._settings.get("token_values")
            and isinstance(mask, Tensor)
            and mask.ndim == 2
            and as_packed(ids) is None
        ):
            # padding is nobody's, so that an example has as many token values as tokens
            ids = [[i if real else None for real in row] for i, row in zip(as_ids(ids), mask.tolist(), strict=True)]
        for name in ("max_length_q", "max_length_k"):
            if isinstance(inputs.get(name), int):  # a number of each batch's own, which would be a call of another kind
                inputs[name] = torch.tensor(inputs[name])
        if self._shifts and "labels" in inputs:
            inputs["shift_labels"] = shifted(inputs["labels"])
        with self.attributor.batch(ids, recorded(self._trainer, inputs, args, kwargs)) as microbatch:
            loss: Tensor = self._training_step(model, inputs, *args, **kwargs)
            microbatch.loss = loss
        return loss

    def _dataloader_with_ids(self) -> DataLoader[Any]:
        trainer = self._trainer
        trainer._set_signature_columns_if_needed()
        collator, columns = trainer.data_collator, trainer._signature_columns
        trainer.data_collator = CollateWithIds(collator, self._id_column)
        trainer._signature_columns = [*(columns or []), self._id_column]
        try:
            loader: DataLoader[Any] = self._get_train_dataloader()
        finally:
            trainer.data_collator, trainer._signature_columns = collator, columns
        if trainer.args.world_size > 1 and isinstance(loader, DataLoaderDispatcher):
            raise InrunError(
                "the first process hands out the batches of this dataset, and ids are not handed out with them: give "
                'TrainingArguments accelerator_config={"dispatch_batches": False}, and every process its own part of a '
                "stream (datasets.distributed.split_dataset_by_node)."
            )
        return loader

    def _log_with_books(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # of training steps: an evaluation's names begin with "eval_"
            logs.update(self._books.taken())
        self._log(logs, *args, **kwargs)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _without_tensors(state: Any, tensors: list[Tensor]) -> Any:
    """The state as JSON holds it, its tensors moved to the list."""
    if isinstance(state, Tensor):
        tensors.append(state)
        return {_TENSOR: len(tensors) - 1}
    if isinstance(state, Mapping):
        return {key: _without_tensors(value, tensors) for key, value in state.items()}
    return [_without_tensors(value, tensors) for value in state] if isinstance(state, list) else state


def _with_tensors(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The counterpart of `_without_tensors`."""
    if isinstance(state, dict):
        if state.keys() == {_TENSOR}:
            return tensors[str(state[_TENSOR])]
        return {key: _with_tensors(value, tensors) for key, value in state.items()}
    return [_with_tensors(value, tensors) for value in state] if isinstance(state, list) else state


def _stored_state(folder: Path, step: int) -> dict[str, Any]:
    """The attributor's state of a checkpoint; its step alone where the checkpoint lies elsewhere, or has none."""
    if not (folder / MARK).exists():
        return {"step": step}
    tensors = load_file(folder / STATE) if (folder / STATE).exists() else {}
    found: dict[str, Any] = _with_tensors(json.loads((folder / MARK).read_text()), tensors)
    return found


def last_checkpoint(folder: str | PathLike[str]) -> Path | None:
    """The newest checkpoint in a Trainer's output folder that was written whole under `attach`."""
    whole = [mark.parent for mark in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARK}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
