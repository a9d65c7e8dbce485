"""Hugging Face's Trainer: `attach(trainer, targets=..., ledger=...)` before `trainer.train()`.

Ids travel in a column of the training examples: past the Trainer's pruning of columns, around the collator (which never
sees them), and off the batch again before the model is called. Evaluation and prediction are left as they are.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from inrun.attributor import Attributor
from inrun.errors import InrunError
from inrun.packed import as_packed
from inrun.state import preserved_random_state
from inrun.step import as_ids
from inrun.target import Loss

MARK = "inrun.json"
STATE = "inrun.safetensors"
_TENSOR = "tensor in inrun.safetensors"


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a Hugging Face model returns for a batch with labels: the mean over the batch's tokens."""
    loss: Tensor = model(**batch).loss
    return loss


def attach(
    trainer: Trainer,
    targets: Mapping[str, Any],
    *,
    id_column: str = "id",
    ledger: str | PathLike[str] | None = None,
    loss: Loss = model_loss,
    resume: bool | None = None,
    **settings: Any,
) -> "InrunCallback":
    """Value every training example of a Trainer's run. Call it before `trainer.train()`.

    Args:
        trainer: any Trainer on one process whose training examples have an id in `id_column` (ints or strings), or of
            packed documents a list of ids, one for every token. (Such examples must have one length: how a collator
            pads them, it does not say.)
        targets: name -> what `inrun.Attributor` takes, or a dataset, batched by the trainer's own collator at its
            evaluation batch size and used in rotation.
        ledger: the folder for the values. It is flushed before every checkpoint of the trainer.
        loss: a target batch's mean loss; by default the one that the model returns.
        resume: whether the ledger's folder may hold this run already; by default, whether the trainer resumes from a
            checkpoint. The ledger is then cut back to the checkpoint's step.
        settings: the other arguments of `inrun.Attributor`.

    Returns:
        The callback; its `attributor` is there from the beginning of training on, and closed at its end.
    """
    callback = InrunCallback(trainer, targets, id_column, dict(ledger=ledger, loss=loss, **settings), resume)
    trainer.add_callback(callback)
    return callback


class InrunCallback(TrainerCallback):
    """Opens the attributor when training begins, marks its batches, and closes it when training ends."""

    def __init__(
        self,
        trainer: Any,
        targets: Mapping[str, Any],
        id_column: str,
        settings: dict[str, Any],
        resume: bool | None,
    ) -> None:
        if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
            raise InrunError("runs on several processes or devices are not supported yet: train on one.")
        self.attributor: Attributor | None = None
        self._trainer, self._targets, self._id_column = trainer, targets, id_column
        self._settings, self._resume = settings, resume
        # on the instance, so that any subclass keeps its own; taken off again by `detach`
        self._training_step, self._get_train_dataloader = trainer.training_step, trainer.get_train_dataloader
        trainer.training_step = self._attributed_step
        trainer.get_train_dataloader = self._dataloader_with_ids

    def detach(self) -> None:
        """Leave the trainer, and the model and optimizer, as they were."""
        for name in ("training_step", "get_train_dataloader"):
            self._trainer.__dict__.pop(name, None)
        if self.attributor is not None:
            self.attributor.detach()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        optimizer = trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(optimizer, Optimizer):
            raise InrunError(f"the trainer's optimizer is a {type(optimizer).__name__}, not one of torch.optim.")
        resume = state.global_step > 0 if self._resume is None else self._resume
        targets = {name: self._batches(name, given) for name, given in self._targets.items()}
        self.attributor = Attributor(trainer.model, optimizer, targets, resume=resume, **self._settings)
        if resume:
            self.attributor.load_state_dict(_stored_state(_checkpoint(args, state), state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.attributor is None:
            return
        if self._trainer.accelerator.optimizer_step_was_skipped:  # by a gradient scaler: these batches moved nothing
            self.attributor.discard()
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
        if tensors:
            save_file({str(k): x.contiguous() for k, x in enumerate(tensors)}, folder / STATE)
        temporary = folder / f".{MARK}"
        temporary.write_text(json.dumps(mark))
        os.replace(temporary, folder / MARK)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.detach()
        if self.attributor is not None:
            self.attributor.close()

    def _attributed_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.attributor is None:
            raise InrunError("training began without on_train_begin: call trainer.train(), not training_step().")
        ids, mask = inputs.pop(self._id_column), inputs.get("attention_mask")
        if (
            self._settings.get("token_values")
            and isinstance(mask, Tensor)
            and mask.ndim == 2
            and as_packed(ids) is None
        ):
            # padding is nobody's, so that an example has as many token values as tokens
            ids = [[i if real else None for real in row] for i, row in zip(as_ids(ids), mask.tolist(), strict=True)]
        with self.attributor.batch(ids) as microbatch:
            loss: Tensor = self._training_step(model, inputs, *args, **kwargs)
            microbatch.loss = loss
        return loss

    def _dataloader_with_ids(self) -> DataLoader[Any]:
        trainer = self._trainer
        trainer._set_signature_columns_if_needed()
        collator, columns = trainer.data_collator, trainer._signature_columns
        trainer.data_collator = _CollateIds(collator, self._id_column)
        trainer._signature_columns = [*(columns or []), self._id_column]
        try:
            loader: DataLoader[Any] = self._get_train_dataloader()
        finally:
            trainer.data_collator, trainer._signature_columns = collator, columns
        return loader

    def _batches(self, name: str, given: Any) -> Any:
        """A target as the Attributor takes it; a dataset is cut into batches on the model's device."""
        if hasattr(given, "__getitem__") and not isinstance(given, list | tuple | Mapping | Tensor):
            if not len(given):
                raise InrunError(f"target {name!r} has no batches: its dataset is empty.")
            with preserved_random_state(self._trainer.model):  # a DataLoader draws a seed
                given = list(self._trainer.get_eval_dataloader(given))
        if isinstance(given, list | DataLoader):
            return [self._prepared(batch) for batch in given]
        return self._prepared(given)

    def _prepared(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            batch = {key: value for key, value in batch.items() if key != self._id_column}
        return self._trainer._prepare_input(batch)


class _CollateIds:
    """The collator that the trainer had, with the ids taken around it."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any], id_column: str) -> None:
        self._collate, self._id_column = collate, id_column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        column = self._id_column
        lacking = next((k for k, example in enumerate(examples) if column not in example), None)
        if lacking is not None:
            raise InrunError(
                f"a training example has no {column!r} column (it has {', '.join(map(str, examples[lacking]))}): add "
                "one, with an int or a string for every example, or name another with id_column=."
            )
        ids = [example[column] for example in examples]
        batch = self._collate([{k: v for k, v in example.items() if k != column} for example in examples])
        batch[column] = [i.tolist() if isinstance(i, Tensor) else i for i in ids]
        return batch


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
