"""A Trainer's steps again, for a replay: what is kept of them, and the loss that was made of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inrun.errors import InrunError
from inrun.integrations.sft import head_called, prepared_target
from inrun.ledger import Ledger
from inrun.replaying.face import replay
from inrun.replaying.recording import Recording
from inrun.state import preserved_random_state
from inrun.target import Loss


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a Hugging Face model returns for a batch with labels: the mean over the batch's tokens."""
    loss: Tensor = model(**batch).loss
    return loss


def recording_of(trainer: Any, given: bool | Recording) -> bool | Recording:
    """The recording that was asked for, with the clipping and the scaler of the trainer."""
    if not given:
        return False
    how = given if isinstance(given, Recording) else Recording()
    norm = trainer.args.max_grad_norm
    return replace(
        how,
        clip_norm=how.clip_norm if how.clip_norm is not None or how.clip_value is not None else norm or None,
        scaler=how.scaler if how.scaler is not None else trainer.accelerator.scaler,
    )


def optimizer_of(trainer: Any) -> Optimizer:
    """The trainer's optimizer. Raises InrunError if it is none of torch's."""
    found = trainer.optimizer
    if not isinstance(found, Optimizer):
        raise InrunError(f"the trainer's optimizer is a {type(found).__name__}, not one of torch.optim.")
    return found


def recorded(trainer: Any, inputs: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a training step's loss is made of."""
    return {
        "inputs": dict(inputs),
        "args": list(args),
        "kwargs": dict(kwargs),
        "accumulation": trainer.current_gradient_accumulation_steps,
    }


def step_loss(trainer: Any, model: nn.Module, data: Mapping[str, Any]) -> Tensor:
    """The loss that the trainer's step calls backward() on, whatever its class makes of it."""
    taken: list[Tensor] = []
    accelerator = trainer.accelerator

    def backward(loss: Tensor, **_: Any) -> None:
        taken.append(loss / accelerator.gradient_accumulation_steps)

    trainer.current_gradient_accumulation_steps = data["accumulation"]
    vars(accelerator)["backward"] = backward
    try:
        trainer.training_step(model, dict(data["inputs"]), *data["args"], **data["kwargs"])
    finally:
        del vars(accelerator)["backward"]
    if len(taken) != 1:
        raise InrunError(f"training_step() called accelerator.backward() {len(taken)} times: a replay needs one loss.")
    return taken[0]


class Replayed(Exception):  # noqa: N818 - no error: training ends where it would begin
    """The replay is done."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger


class Replay(TrainerCallback):
    """Replays a run in place of the training that begins, when model and optimizer are as they were in it."""

    def __init__(
        self,
        trainer: Any,
        run: Any,
        targets: Mapping[str, Any],
        id_column: str,
        loss: Loss,
        settings: Mapping[str, Any],
    ) -> None:
        self._trainer, self._run, self._targets = trainer, run, targets
        self._id_column, self._loss, self._settings = id_column, loss, settings

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        with head_called(trainer):
            ledger = replay(
                self._run,
                batches_of(trainer, self._targets, self._id_column),
                self._loss,
                model=trainer.model,
                optimizer=optimizer_of(trainer),
                train_loss=lambda model, data: step_loss(trainer, model, data),
                **self._settings,
            )
        raise Replayed(ledger)


def batches_of(trainer: Any, targets: Mapping[str, Any], id_column: str) -> dict[str, Any]:
    """Targets as the Attributor takes them; a dataset is cut into batches on the model's device."""
    return {name: _batches(trainer, name, given, id_column) for name, given in targets.items()}


def _batches(trainer: Any, name: str, given: Any, id_column: str) -> Any:
    holds = hasattr(given, "__iter__") or hasattr(given, "__getitem__")
    if holds and not isinstance(given, list | tuple | Mapping | Tensor | DataLoader):
        with preserved_random_state(trainer.model), _unprepared(trainer):  # a DataLoader draws a seed
            given = list(trainer.get_eval_dataloader(prepared_target(trainer, given, name)))
        if not given:
            raise InrunError(f"target {name!r} has no batches: its dataset is empty.")
    if isinstance(given, list | DataLoader):
        return [_prepared(trainer, batch, id_column) for batch in given]
    return _prepared(trainer, given, id_column)


def _prepared(trainer: Any, batch: Any, id_column: str) -> Any:
    if isinstance(batch, Mapping):
        batch = {key: value for key, value in batch.items() if key != id_column}
    return trainer._prepare_input(batch)


@contextmanager
def _unprepared(trainer: Any) -> Iterator[None]:
    """Data loaders that are made inside the block have all batches, not this process's share of them."""
    held = vars(trainer.accelerator)
    held["prepare"] = lambda loader: loader
    try:
        yield
    finally:
        del held["prepare"]
