"""The recorded run again, bit for bit: the weights and the optimizers' state before every step, and its gradient."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inrun.replaying.record import Batch, BatchOf, Line, Record
from inrun.replaying.recording import DRIFTS, RESTS, held_by, mark
from inrun.replaying.store import RecordingError
from inrun.scratch import size_of
from inrun.state import RandomState, State
from inrun.update import Moved, update_of

Snapshot = tuple[int, dict[str, Tensor], dict[str, Any]]  # step, tensors and numbers by name
TrainLoss = Callable[[nn.Module, Any], Tensor]
_DIFFERS = (
    "Usual causes: train_loss is not what backward() was called on in the run (its division by the number of "
    "accumulated batches included), or was under another autocast; the data or the model is another; the gradient was "
    "changed otherwise than Recording() says; weights were changed beside the optimizer; another number of threads, "
    "device or version."
)


@dataclass
class Found:
    """What a step found, on the host: weights, optimizer state and buffers before it; and the gradient as backward made
    it, without the loss's scale.
    """

    line: Line
    weights: dict[nn.Parameter, Tensor]
    states: dict[nn.Parameter, dict[str, Any]]
    buffers: dict[str, Tensor]
    gradient: dict[nn.Parameter, Tensor]
    drifting: set[nn.Parameter] = field(default_factory=set)  # by momentum or decay alone: they were frozen


class Trajectory:
    """Takes a model and its optimizers through the recorded run. It leaves them as the last step that it took."""

    def __init__(
        self,
        record: Record,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        names: Mapping[nn.Parameter, str],
        train_loss: TrainLoss,
        batch_of: BatchOf | None,
    ) -> None:
        record.check(model, optimizers, names)
        self.record, self.model, self.names = record, model, names
        self._optimizers, self._train_loss, self._batch_of = optimizers, train_loss, batch_of
        self.device = next(iter(names)).device
        self._buffers: dict[str, Tensor] = {}
        self._met: dict[str, Tensor] = {}  # buffers that the step found which is gone back through
        self._casts: bool | None = None  # train_loss does so itself; None: not known yet
        self.step = -1  # that the model stands after

    def begin(self, step: int) -> None:
        """Put the model and its optimizers where the checkpoint after this step has them."""
        self.restore((step, *self.record.read(step)))
        if step and mark(self.names) != self.record.line(step).mark:
            raise RecordingError(
                f"{self.record.folder}: the checkpoint of step {step} has other weights than the optimizers left: they "
                "were changed between two steps, which a replay cannot repeat."
            )

    def snapshot(self) -> Snapshot:
        """Where the model and its optimizers stand, on the host."""
        tensors, numbers = held_by(self.model, self._optimizers, self.names)
        return self.step, {name: x.to("cpu", copy=True) for name, x in tensors.items()}, numbers

    def restore(self, snapshot: Snapshot) -> None:
        """Put the model and its optimizers there again."""
        self.step, tensors, numbers = snapshot
        own = held_by(self.model, self._optimizers, self.names)[0]
        here = {name: x for name, x in own.items() if not name.startswith("state/")}
        if missing := here.keys() ^ {name for name in tensors if not name.startswith("state/")}:
            raise RecordingError(
                f"{self.record.folder}: the model's buffers are others ({', '.join(sorted(missing))})."
            )
        with torch.no_grad():
            for name, x in here.items():
                x.copy_(tensors[name])
        for k, optimizer in enumerate(self._optimizers):
            _load_state(optimizer, f"state/{k}/", {**tensors, **numbers}, self.names)

    def batches(self, step: int) -> list[Batch]:
        """What the step was made of."""
        return self.record.batches(step, self._batch_of, self.device)

    def loss(self, batch: Batch) -> Tensor:
        """The training loss of a batch, with the random numbers, modes and precision of the run."""
        for module, mode in zip(self.model.modules(), batch.modes, strict=True):
            module.training = mode == "1"
        if self._casts is None and batch.autocast is not None:
            self._casts = self._casts_itself(batch)
        around = batch.autocast is not None and not self._casts
        RandomState.of(self.model, batch.random).restore()
        cast = torch.autocast(self.device.type, batch.autocast or torch.bfloat16, around)
        with torch.enable_grad(), cast:
            loss = self._train_loss(self.model, batch.fresh())
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise RecordingError(
                "train_loss(model, batch) must return the scalar tensor that backward() was called on in the run, with "
                f"its graph; got {type(loss).__name__}."
            )
        return loss.reshape(())

    def _casts_itself(self, batch: Batch) -> bool:
        """Whether train_loss runs the model in the batch's precision, nothing being around it: then only what it says
        is computed so.
        """
        seen, device = list[torch.dtype](), self.device.type

        def look(*_: Any) -> None:
            if torch.is_autocast_enabled(device):
                seen.append(torch.get_autocast_dtype(device))

        hook, state = self.model.register_forward_pre_hook(look), State(self.model)
        try:
            with (
                torch.no_grad(),
                torch.autocast(device, enabled=False),
                RandomState.of(self.model, batch.random).replayed(),
            ):
                self._train_loss(self.model, batch.fresh())
        finally:
            hook.remove()
            state.restore()
        return seen[:1] == [batch.autocast]

    def take(self) -> Found:
        """Take the next step. Raises RecordingError if the weights after it are not those of the run."""
        line = self.record.line(self.step + 1)
        found = self._found(line)
        for p in self.model.parameters():
            p.grad = None
        for batch in self.batches(line.step):
            (self.loss(batch) * line.scale).backward()  # type: ignore[no-untyped-call]
        if line.scale != 1:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.mul_(1 / line.scale)
        for p, had in zip(self.names, line.moved or (), strict=False):
            if had == RESTS:  # it was frozen in the run, or its gradient dropped
                p.grad = None
            elif had == DRIFTS or p.grad is None:  # by zero_grad(set_to_none=False)
                p.grad = torch.zeros_like(p)
            if had == DRIFTS:
                found.drifting.add(p)
        found.gradient = {p: p.grad.detach().to("cpu", copy=True) for p in self.names if p.grad is not None}
        self._clip()
        for optimizer, groups in zip(self._optimizers, line.groups, strict=True):
            for group, recorded in zip(optimizer.param_groups, groups, strict=True):
                set_hyperparameters(group, recorded)
            optimizer.step()
        for p in self.model.parameters():
            p.grad = None
        self.step = line.step
        if mark(self.names) != line.mark:
            raise RecordingError(
                f"{self.record.folder}: repeating step {line.step} leads to other weights than the run had, so that a "
                f"replay would be of another run. {_DIFFERS}"
            )
        return found

    def to_end(self) -> None:
        """Put the model and its optimizers after the run's last step."""
        self.begin(self.record.checkpoints()[-1])
        while self.step < self.record.steps:
            self.take()

    def check_arrived(self) -> None:
        """Hold the model against the checkpoint after the step that it stands after, number by number."""
        tensors, _ = self.record.read(self.step)
        now, _ = held_by(self.model, self._optimizers, self.names)
        apart = [name for name, x in now.items() if name in tensors and not _equal(x, tensors[name])]
        if apart:
            raise RecordingError(
                f"{self.record.folder}: the run, repeated, arrives at step {self.step} with other numbers than were "
                f"recorded ({', '.join(apart[:4])}{', ...' if len(apart) > 4 else ''}). {_DIFFERS}"
            )

    def _clip(self) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm, value = self.record.about["clip_norm"], self.record.about["clip_value"]
        if norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, norm)
        if value is not None:
            torch.nn.utils.clip_grad_value_(parameters, value)

    def _found(self, line: Line) -> Found:
        """Copies of what the next step finds; a buffer that did not change is the copy that was made before."""
        weights = {p: p.detach().to("cpu", copy=True) for p in self.names}
        states: dict[nn.Parameter, dict[str, Any]] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in (p for p in group["params"] if p in self.names):
                    states[p] = {
                        k: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x
                        for k, x in optimizer.state.get(p, {}).items()
                    }
        for name, x in self.model.named_buffers():
            if name not in self._buffers or not _equal(x, self._buffers[name]):
                self._buffers[name] = x.detach().to("cpu", copy=True)
        return Found(line, weights, states, dict(self._buffers), {})

    def moves(self, found: Found) -> dict[nn.Parameter, Moved]:
        """What the optimizers met at the step: the gradient that backward made, state and hyperparameters."""
        moves = {}
        for optimizer, groups in zip(self._optimizers, found.line.groups, strict=True):
            update = update_of(optimizer)
            for group, recorded in zip(optimizer.param_groups, groups, strict=True):
                hyper = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}
                for p in (p for p in group["params"] if p in found.gradient):
                    state = {
                        k: x.to(p.device) if isinstance(x, Tensor) and x.ndim else x for k, x in found.states[p].items()
                    }
                    weight, gradient = found.weights[p].to(p.device), found.gradient[p].to(p.device)
                    moves[p] = Moved(weight, gradient, state, hyper, update)
        return moves

    @contextmanager
    def before(self, found: Found) -> Iterator[None]:
        """The model inside the block as the step found it."""
        with torch.no_grad():
            for p, x in found.weights.items():
                p.copy_(x)
        self._met = found.buffers
        self.restore_buffers()
        yield
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """The model's buffers as the step found them, inside of `before`; a forward pass may write to them."""
        with torch.no_grad():
            for name, x in self.model.named_buffers():
                x.copy_(self._met[name])

    def state_size(self) -> int:
        """Bytes of host memory that a step's `Found` takes."""
        tensors, _ = held_by(self.model, self._optimizers, self.names)
        weights = size_of(p.detach() for p in self.names)
        return size_of(x for name, x in tensors.items() if not name.startswith("buffer/")) + weights


def set_hyperparameters(group: dict[str, Any], recorded: Mapping[str, Any]) -> None:
    """Give a parameter group those of a recorded step."""
    for name, x in recorded.items():
        if isinstance(group.get(name), Tensor):
            group[name].fill_(x)
        else:
            group[name] = tuple(x) if isinstance(x, list) else x


def _load_state(optimizer: Optimizer, prefix: str, found: Mapping[str, Any], names: Mapping[nn.Parameter, str]) -> None:
    """Give an optimizer the state under this prefix, as its own load_state_dict does."""
    of: dict[str, dict[str, Any]] = {}
    for name, x in found.items():
        if name.startswith(prefix):
            parameter, _, key = name.removeprefix(prefix).rpartition("/")
            of.setdefault(parameter, {})[key] = x
    given = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    given["state"] = {k: of[names[p]] for k, p in enumerate(order) if names.get(p) in of}
    optimizer.load_state_dict(given)


def _equal(x: Tensor, y: Tensor) -> bool:
    y = y.to(x.device)
    return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())
