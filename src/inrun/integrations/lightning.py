"""Lightning: `Trainer(callbacks=[InrunCallback(targets, loss, ledger=...)])`, and every step of `fit` is booked.

Lightning runs training_step, backward and clipping in a closure that it hands to optimizer.step(). While `fit` runs,
that step evaluates the closure first and then moves the weights, so that the gradients are there when the values are
computed; training_step opens the batch, and the end of backward closes it. After `fit` both are as they were.
"""

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from os import PathLike
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from inrun.attributor import Attributor
from inrun.errors import InrunError
from inrun.integrations.books import Books
from inrun.state import preserved_random_state
from inrun.step import Microbatch


class InrunCallback(Callback):
    """Values every training example of a Lightning Trainer's `fit`.

    Args:
        targets: name -> what `inrun.Attributor` takes. Batches are moved to the module's device.
        loss: loss(module, batch) -> the mean loss of a target's batch. It is given the LightningModule, in eval mode,
            and should log nothing.
        id_key: where a training batch has its ids: a key of a mapping or an index of a tuple or list, which is taken
            out, so that training_step sees the batch as it was without ids; or a function batch -> ids, which leaves
            the batch as it is.
        ledger: the folder for the values. A run that goes on from a checkpoint (`fit(ckpt_path=...)`) goes on in it,
            cut back to the checkpoint's step; one that begins wants a folder without a run. Under `fast_dev_run`, which
            keeps nothing, no ledger is written.
        model: the module whose forward the examples go through: its name in the LightningModule, or a function
            LightningModule -> module. By default the child that holds all parameters of the optimizer, called as
            `self.child(x)`, or by forward; where no single child does, the LightningModule, called as `self(x)`.
        settings: the other arguments of `inrun.Attributor`.

    `attributor` is there from the beginning of training on, and closed at its end. Its state is in every checkpoint.
    At every `log_every_n_steps` the loggers get, of each target, `inrun/TARGET/value` (the sum of the steps' values
    since they were last logged, in nats of the target's loss; positive helps) and `inrun/TARGET/loss` (where its
    gradient was last taken), the largest `inrun/conservation`, and of audited steps the sums of
    `inrun/TARGET/unexplained`, `/momentum` and `/decay`. Under momentum="credit" a step's are logged when they are
    final; those that the end of training makes final are in the ledger alone.

    With manual optimization, `with callback.batch(ids):` goes around forward and `self.manual_backward`; the
    optimizers' step() comes after the block.

    Raises:
        InrunError, when training begins: what `inrun.Attributor` refuses; at the first batch: batches without ids, or a
        training_step that does not call the model.
    """

    def __init__(
        self,
        targets: Mapping[str, Any],
        loss: Callable[[Any, Any], Tensor],
        *,
        id_key: str | int | Callable[[Any], Any] = "id",
        ledger: str | PathLike[str] | None = None,
        model: str | Callable[[Any], nn.Module] | None = None,
        **settings: Any,
    ) -> None:
        self.attributor: Attributor | None = None
        self._targets, self._loss, self._id_key, self._model = targets, loss, id_key, model
        self._settings = {**settings, "ledger": ledger}
        self._state: dict[str, Any] = {}  # of the checkpoint that fit goes on from, or of the end of the last fit
        self._running = False
        self._undo = ExitStack()
        self._block: AbstractContextManager[Microbatch] | None = None
        self._called = False  # the model, by training_step
        self._due = False  # a step that was not taken yet
        self._books = Books()  # what the loggers get next

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model, wrapped = self._model_in(pl_module, trainer.optimizers), trainer.strategy.model
        within = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        if within is not None and model is pl_module:
            raise InrunError(
                "on several processes the examples must go through a module in the LightningModule, which "
                "DistributedDataParallel calls for itself: have training_step call one that holds all trained "
                "parameters, self.model(...), or name it with model=."
            )
        targets = {name: self._batches_of(given, trainer, pl_module) for name, given in self._targets.items()}
        resume = trainer.global_step > 0
        settings = {"resume": resume, **self._settings}
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            settings["ledger"] = None
        before = self.attributor
        self.attributor = attributor = Attributor(
            model, trainer.optimizers, targets, self._loss_of(pl_module), within=within, **settings
        )
        if resume:
            step = trainer.global_step if before is None else before.step
            attributor.load_state_dict(self._state or {"step": step})
        self._running, self._called, self._due = True, False, False
        self._books = Books(attributor.step)
        self._undo.callback(model.register_forward_pre_hook(self._first_call).remove)
        for optimizer in trainer.optimizers:
            self._replace(optimizer, "step", self._closure_first(optimizer))
        if pl_module.automatic_optimization:
            self._replace(pl_module, "training_step", self._attributed(trainer, pl_module.training_step))

    def batch(self, ids: Any) -> AbstractContextManager[Microbatch]:
        """`Attributor.batch`, for a training_step with manual optimization."""
        if self.attributor is None:
            raise InrunError("the attributor is made when training begins: call batch() in training_step.")
        return self.attributor.batch(ids)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._block is None:
            return
        if not self._called:
            self._abandon()
            raise InrunError(self._not_called(pl_module))
        block, self._block = self._block, None
        block.__exit__(None, None, None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._due = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        attributor = self.attributor
        if attributor is None or not self._running:
            return
        self._abandon()
        if self._due:  # a gradient scaler left the step out: these batches moved nothing
            attributor.discard()
            self._due = False
        self._books.add(attributor)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step % every == 0 or trainer.should_stop) and (taken := self._books.taken()):
            for logger in trainer.loggers:
                logger.log_metrics(taken, step=trainer.global_step - 1)  # Lightning counts from 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attributor is not None and self._running:
            self._leave()
            self._state, self._running = self.state_dict(), False  # which waits for what all processes write
            self.attributor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.attributor is not None and self._running:
            self._leave()
            self._running = False  # it may be this process's alone: the others are not waited for
            self.attributor.close()

    def state_dict(self) -> dict[str, Any]:
        """The attributor's state for Lightning's checkpoint; the ledger is flushed first. Batches that wait for their
        step are left out, as their gradients are by Lightning.
        """
        attributor = self.attributor
        if attributor is None or not self._running:
            return self._state
        pending, attributor._pending = attributor._pending, []
        try:
            return attributor.state_dict()
        finally:
            attributor._pending = pending

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _leave(self) -> None:
        """Leave the module and its optimizers as they were."""
        self._abandon()
        self._undo.close()
        if self.attributor is not None:
            self.attributor.discard()  # Lightning drops what it has accumulated

    def _abandon(self) -> None:
        """Leave a batch that had no backward pass: training_step returned None, or raised."""
        block, self._block = self._block, None
        if block is not None:
            nothing = InrunError("no backward pass")
            block.__exit__(InrunError, nothing, None)

    def _replace(self, holder: Any, name: str, by: Any) -> None:
        """Give the object, not its class, another method until `_undo` is closed."""
        held = vars(holder)
        if name in held:
            self._undo.callback(held.__setitem__, name, held[name])
        else:
            self._undo.callback(held.pop, name)
        held[name] = by

    def _first_call(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self._block is not None:
            self._called = True

    def _closure_first(self, optimizer: Optimizer) -> Callable[..., Any]:
        """The optimizer's step, which evaluates a closure before it begins."""
        step = optimizer.step

        @wraps(step)
        def closure_first(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            found = None
            if closure is not None:
                with torch.enable_grad():
                    found = closure()
                self._abandon()
            self._due = False
            gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
            if self.attributor is not None and not self.attributor._pending and all(g is None for g in gradients):
                return found  # training_step returned None: nothing would move
            taken = step(**kwargs)
            return taken if closure is None else found

        return closure_first

    def _attributed(self, trainer: Trainer, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """training_step, which opens a batch; the end of backward closes it."""

        @wraps(training_step)
        def attributed(batch: Any, *args: Any, **kwargs: Any) -> Any:
            ids, batch = self._ids_of(batch)
            block = self.batch(ids)
            microbatch = block.__enter__()
            self._block = block
            try:
                output = training_step(batch, *args, **kwargs)
            except InrunError as error:
                if self._called:
                    raise
                raise InrunError(self._not_called(trainer.lightning_module)) from error
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if isinstance(loss, Tensor):
                microbatch.loss = loss.detach() / trainer.accumulate_grad_batches
            return output

        return attributed

    def _ids_of(self, batch: Any) -> tuple[Any, Any]:
        """A batch's ids, and the batch without them."""
        key = self._id_key
        if callable(key):
            return key(batch), batch
        if isinstance(key, str) and isinstance(batch, MutableMapping):
            if key in batch:
                left = copy.copy(batch)
                return left.pop(key), left
            what = f"one with the keys {', '.join(map(str, batch))}"
        elif isinstance(key, int) and type(batch) in (tuple, list):
            if -len(batch) <= key < len(batch):
                rest = list(batch)
                return rest.pop(key), type(batch)(rest)
            what = f"a {type(batch).__name__} of {len(batch)}"
        else:
            what = f"a {type(batch).__name__}"
        raise InrunError(
            f"id_key={key!r}: a training batch has no such entry, it is {what}. Have the dataset return an int or a "
            "string with every example, and give id_key= its key in a mapping, its index in a tuple, or a function "
            "batch -> ids."
        )

    def _model_in(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> nn.Module:
        """The module that the Attributor is given."""
        if isinstance(self._model, str):
            return module.get_submodule(self._model)
        if self._model is not None:
            return self._model(module)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        moved = {p for group in groups for p in group["params"]}
        for child in module.children():
            # what has no forward, as a list of modules, is not called
            if moved <= set(child.parameters()) and type(child).forward is not nn.Module.forward:
                return child
        return module

    def _not_called(self, module: LightningModule) -> str:
        assert self.attributor is not None
        names = {m: name for name, m in module.named_modules()}
        name = names.get(self.attributor.model)
        call = f"self.{name}(...), or self(...) whose forward does it," if name else "self(...),"
        return (
            f"training_step of {type(module).__name__} did not call the model that the Attributor was given, so that "
            f"it cannot be told which rows belong to which example: it should call {call} not parts of it, nor "
            "self.forward(...). Put what training_step does with these parts into forward, or name another module "
            "with model=."
        )

    def _loss_of(self, module: LightningModule) -> Callable[[nn.Module, Any], Tensor]:
        """The targets' loss, of the LightningModule, all of it in eval mode: the Attributor sees to its model alone."""

        def loss(model: nn.Module, batch: Any) -> Tensor:
            training = [m for m in module.modules() if m.training]
            for m in training:
                m.training = False
            try:
                return self._loss(module, batch)
            finally:
                for m in training:
                    m.training = True

        return loss

    def _batches_of(self, given: Any, trainer: Trainer, module: LightningModule) -> Any:
        """A target as the Attributor takes it, on the module's device and without ids."""
        if isinstance(given, DataLoader):
            with preserved_random_state(module):  # it draws a seed
                given = list(given)
        if isinstance(given, list):
            return [self._prepared(batch, trainer, module) for batch in given]
        return self._prepared(given, trainer, module)

    def _prepared(self, batch: Any, trainer: Trainer, module: LightningModule) -> Any:
        if isinstance(batch, Mapping) and self._id_key in batch:
            batch = {key: value for key, value in batch.items() if key != self._id_key}
        return module.transfer_batch_to_device(trainer.precision_plugin.convert_input(batch), module.device, 0)
