"""The face of the library: attach to a model and its optimizer, mark the batches, and every step is booked.

One step, from batch to ledger:

    with attributor.batch(ids): ...backward()   capture.py: inputs and output gradients of every unit
    optimizer.step()                            direction.py: q from the optimizer's move and the target's gradient,
                                                tangent/contraction.py: phi_i = <g_i, q>,
                                                books.py: do the values add up?
                                                ledger/: step, id, target, value
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inrun.books import Audit, check_conservation, groups_of, losses_without_data
from inrun.capture import Capture, find_units, trained_parameters
from inrun.direction import directions, displacements, pieces
from inrun.errors import InrunError, NonFiniteError
from inrun.gradient import Received
from inrun.ledger import LedgerWriter
from inrun.provenance import describe
from inrun.step import Id, Microbatch, Step, as_ids
from inrun.tangent.contraction import contract
from inrun.target import Evaluation, Loss, Target
from inrun.update import Moved, check_move, update_of


class Attributor:
    """Values every training example of a run while it trains (In-Run Data Shapley; design, section 2).

    Args:
        model: the model that is trained. Its tensor inputs hold the examples in dimension `batch_dim`.
        optimizer: torch.optim.SGD, Adam or AdamW over parameters of the model.
        targets: name -> one batch (tensor, tuple or mapping), or a list or DataLoader of batches used in rotation, one
            a step.
        loss: loss(model, batch) -> scalar tensor, the mean loss of a target's batch; it is evaluated in eval mode.
        scheme: "path" (Aumann-Shapley along the optimizer's move) or "first" (the paper's first order).
        nodes: how many points of the path the target's gradient is taken at, each step.
        momentum: "account" books what old momentum does to an account of its own; the only choice so far.
        kernel: "auto" or "tangent", which are the same so far.
        ledger: a folder for the values, or None to keep only `last`. One that holds a run is refused unless `resume`.
        resume: continue the run in the ledger's folder; `load_state_dict` must follow, and cuts the ledger back.
        audit_every: on every k-th step, measure the target's loss before and after the step, and book what the values
            do not explain (0: never).
        nonfinite: when a gradient or a target's loss is not finite, "stop" raises before the optimizer moves, "skip"
            books the step as skipped.
        batch_dim: the dimension of the model's inputs that holds the examples.

    The model, the optimizer and the random state are left as they are: training is bit for bit what it is without.

    Raises:
        InrunError: an unsupported optimizer, parameters that are not the model's, a frozen model, a target without
            batches or one that does not depend on the model, an unknown scheme, a ledger that holds another run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        targets: Mapping[str, Any],
        loss: Loss,
        *,
        scheme: Literal["path", "first"] = "path",
        nodes: int = 1,
        momentum: Literal["account"] = "account",
        kernel: Literal["auto", "tangent"] = "auto",
        ledger: str | PathLike[str] | None = None,
        resume: bool = False,
        audit_every: int = 0,
        nonfinite: Literal["stop", "skip"] = "stop",
        batch_dim: int = 0,
    ) -> None:
        for name, given, known in (
            ("momentum", momentum, ("account",)),
            ("kernel", kernel, ("auto", "tangent")),
            ("nonfinite", nonfinite, ("stop", "skip")),
        ):
            if given not in known:
                raise InrunError(f"{name}={given!r} is not known: choose {' or '.join(map(repr, known))}.")
        if audit_every < 0:
            raise InrunError(f"audit_every={audit_every}: give the number of steps between audits, or 0 for none.")
        if not targets:
            raise InrunError("no targets: give at least one named validation batch.")
        self.model, self.optimizer = model, optimizer
        self.step = 0
        self.last: Step | None = None
        self._nonfinite, self._audit_every = nonfinite, audit_every
        self._path = pieces(scheme, nodes)
        self._update = update_of(optimizer)
        self._names = trained_parameters(model, optimizer)
        self._units = find_units(model, set(self._names))
        self._groups = groups_of(self._units)
        self._group_of = {unit: k for k, group in enumerate(self._groups) for unit in group.units}
        evaluation = Evaluation(model)
        self._targets = [Target(name, batches, loss, evaluation) for name, batches in targets.items()]
        for target in self._targets:
            target.gradient(0, list(self._names))  # a target that cannot be used is refused now, not in mid-run
        self._received = Received(self._names)
        self._pending: list[Microbatch] = []
        self._open = False
        self._id_type: type[int] | type[str] | None = None
        self._waiting: _Waiting | None = None
        self._move_checked = False
        self._ledger: LedgerWriter | None = None
        if ledger is not None:
            run = describe(
                optimizer,
                self._units,
                self._targets,
                scheme=scheme,
                nodes=nodes,
                momentum=momentum,
                audit_every=audit_every,
            )
            self._ledger = LedgerWriter(ledger, run, resume=resume)
        self._capture = Capture(model, self._units, batch_dim)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @contextmanager
    def batch(self, ids: Any) -> Iterator[Microbatch]:
        """Mark the forward and backward passes of one batch; several of them before a step are gradient accumulation.

        Args:
            ids: one id per example, ints or strings: a sequence, or a tensor or array of one dimension. An id may stand
                more than once; its values add up.

        Raises:
            InrunError: ids of another number than the batch's examples, or of other types; no backward pass in the
                block; gradients that changed since the last block.
        """
        if not self._hooks:
            raise InrunError("the attributor is closed or detached: no batch can be valued any more.")
        found = as_ids(ids)
        if self._id_type not in (None, type(found[0])):
            raise InrunError(f"ids were {self._id_type.__name__}s before and are {type(found[0]).__name__}s now.")
        if self._open:
            raise InrunError("a `batch` block was opened inside of another one: close the first before the next.")
        if self._pending:
            self._received.check_untouched()
        self._open = True
        try:
            with self._capture.batch(len(found)) as captured:
                microbatch = Microbatch(found, captured)
                yield microbatch
        finally:
            self._open = False
        if not captured.calls:
            raise InrunError(
                "no gradient reached the model inside the `batch` block: call the model and loss.backward() both "
                "inside of it."
            )
        self._id_type = type(found[0])
        self._pending.append(microbatch)
        self._received.keep()

    def discard(self) -> None:
        """Forget the batches since the last step, for a loop that drops their gradients instead of stepping."""
        self._pending = []

    def flush(self) -> None:
        """Make everything booked so far durable; call it before writing a checkpoint of this step."""
        if self._ledger is not None:
            self._ledger.flush()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to continue the run: the number of steps done. The ledger is flushed first."""
        if self._pending:
            raise InrunError("state_dict() between a batch and its step: take checkpoints after optimizer.step().")
        self.flush()
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step of `state`: rows of later steps are cut from the ledger."""
        self.discard()
        self.step = int(state["step"])
        self.last = None
        if self._ledger is not None:
            self._ledger.cut(self.step)

    def detach(self) -> None:
        """Take every hook off the model and the optimizer; nothing of the attributor stays on them."""
        self._capture.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def close(self) -> None:
        """Detach, and write what is booked. Raises InrunError if a batch still waits for its step."""
        self.detach()
        if self._ledger is not None:
            self._ledger.close()
        if self._pending:
            waiting, self._pending = len(self._pending), []
            raise InrunError(
                f"{waiting} `batch` block(s) had no optimizer.step() after them, so their examples have no value for "
                "it. Step before close(), or call discard() if these gradients were dropped on purpose."
            )

    def __enter__(self) -> "Attributor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        self.close()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise InrunError(
                "optimizer.step(closure) is not supported: call backward() inside `batch`, then step() without a "
                "closure."
            )
        if self._open:
            raise InrunError("optimizer.step() was called inside the `batch` block: end the block first.")
        if not self._pending:
            raise InrunError(
                "optimizer.step() without a `batch` before it: wrap the forward and backward passes in `with "
                "attributor.batch(ids=...)`, or detach() to train on unattributed."
            )
        moves = {
            p: Moved(p.detach(), p.grad, optimizer.state.get(p, {}), group)
            for group in optimizer.param_groups
            for p in group["params"]
            if p in self._names and p.grad is not None
        }
        self._refuse_unseen(moves)
        ids = [i for microbatch in self._pending for i in microbatch.ids]
        try:
            self._waiting = self._evaluate(self.step + 1, ids, moves)
        except NonFiniteError as problem:
            if self._nonfinite == "stop":
                raise NonFiniteError(
                    f"step {self.step + 1}: {problem}. Nothing was moved and nothing booked. Look at the batch with "
                    f"the ids {ids[:8]}, lower the learning rate, or give nonfinite='skip' to book such steps as "
                    "skipped."
                ) from None
            self._waiting = _Waiting(Step(self.step + 1, ids, {}, {}, self._train_loss(), skipped=True))

    def _refuse_unseen(self, moves: Mapping[nn.Parameter, Moved]) -> None:
        """Raise InrunError for gradients that the values could not follow."""
        late = [
            p
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and p not in self._names
        ]
        if late:
            raise InrunError(
                f"the optimizer moves {len(late)} parameter(s) that were frozen, or not yet its own, when the "
                f"Attributor was attached (the first of shape {tuple(late[0].shape)}): detach() and attach again."
            )
        if not moves:
            raise InrunError(
                "no parameter has a gradient any more: call zero_grad() after optimizer.step(), not before it."
            )
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise InrunError(
                "a gradient scaler leaves the unscaling to this fused optimizer, which hides the gradient that it "
                "receives: call scaler.unscale_(optimizer) before scaler.step(optimizer)."
            )

    def _evaluate(self, step: int, ids: list[Id], moves: Mapping[nn.Parameter, Moved]) -> "_Waiting":
        """The values of the step that the optimizer is about to take. Changes nothing."""
        gradients = [moved.gradient for moved in moves.values()]
        norms = torch.stack(torch._foreach_norm(gradients))
        if not bool(norms.isfinite().all()) and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise NonFiniteError("the gradient is not finite")
        for microbatch in self._pending:
            for call in microbatch.captured.calls:
                call.check_inputs()
        audited = self._audit_every > 0 and step % self._audit_every == 0
        losses = losses_without_data(self._targets, step, self._update, moves) if audited else {}
        found = directions(self._targets, step, self._update, moves, self._path)
        scales = self._received.scales(moves)
        values, conservation = {}, {}
        for name, direction in found.items():
            # g_i as the optimizer receives it is scale * (g_i as backward made it); the scale goes over to q
            q = direction.q if scales is None else {p: towards * scales[p] for p, towards in direction.q.items()}
            seen, size = torch.zeros(2, len(self._groups), dtype=torch.float64, device=gradients[0].device)
            parts = [contract(m.captured, q, self._group_of, seen, size) for m in self._pending]
            values[name] = torch.cat(parts).cpu()
            if not bool(values[name].isfinite().all()):
                raise NonFiniteError(f"a value for target {name!r} is not finite")
            conservation[name] = check_conservation(
                self._groups, seen, size, self._received.raw, q, f"step {step}, target {name!r}"
            )
        at = {name: direction.loss for name, direction in found.items()}
        waiting = _Waiting(Step(step, ids, values, at, self._train_loss()), conservation, losses, gradients, norms)
        if any(group.get("nesterov") for group in self.optimizer.param_groups):
            waiting.norms = None  # torch's foreach step adds Nesterov's momentum into the gradient itself
        if audited or not self._move_checked:
            waiting.before = {p: p.detach().clone() for p in moves}
            waiting.expected = displacements(self._update, moves, 1.0)
        return waiting

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        # the optimizer has moved: the step counts as done, whatever cannot be checked or written now
        result = waiting.step
        self.step, self.last, self._pending = result.step, result, []
        if waiting.norms is not None and not torch.equal(
            torch.stack(torch._foreach_norm(waiting.gradients)), waiting.norms
        ):
            raise InrunError(
                f"step {result.step}: the gradients were changed inside of optimizer.step(), after the values were "
                "computed from them (a step hook that clips, most likely), so its values would be wrong. Change them "
                "before step()."
            )
        rates = [group["lr"] for group in self.optimizer.param_groups]
        eps = max((torch.finfo(rate.dtype).eps for rate in rates if isinstance(rate, Tensor)), default=0.0)
        for p, expected in waiting.expected.items():
            # a step of no length, as under a rate of zero, shows nothing
            self._move_checked |= check_move(self._names[p], waiting.before[p], p.detach(), expected, eps)
        rows = [self._row(target, waiting) for target in self._targets]
        if self._ledger is not None:
            self._ledger.book(result.step, result.ids, {name: v.numpy() for name, v in result.values.items()}, rows)

    def _train_loss(self) -> float | None:
        reported = [microbatch.loss for microbatch in self._pending]
        return (
            None
            if any(loss is None for loss in reported)
            else sum(float(loss) for loss in reported if loss is not None)
        )

    def _row(self, target: Target, waiting: "_Waiting") -> dict[str, Any]:
        """The step's row of the ledger's steps table for one target."""
        result, name = waiting.step, target.name
        row: dict[str, Any] = {
            "step": result.step,
            "target": name,
            "examples": len(result.ids),
            "train_loss": result.train_loss,
            "learning_rate": max(float(group["lr"]) for group in self.optimizer.param_groups),
            "skipped": result.skipped,
        }
        if not result.skipped:
            value = float(result.values[name].sum())
            row |= {"loss": result.losses[name], "value": value, "conservation": waiting.conservation[name]}
            if name in waiting.losses:
                before, after_momentum, after_zero = waiting.losses[name]
                row |= Audit(before, after_momentum, after_zero, target.loss(result.step)).row(value)
        return row


@dataclass
class _Waiting:
    """A step between the optimizer's hooks: evaluated, but not yet taken."""

    step: Step
    conservation: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    gradients: list[Tensor] = field(default_factory=list)
    norms: Tensor | None = None
    before: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    expected: dict[nn.Parameter, Tensor] = field(default_factory=dict)
