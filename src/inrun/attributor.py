"""The face of the library: attach to a model and its optimizer, mark the batches, and every step is booked.

One step, from batch to ledger:

    with attributor.batch(ids): ...backward()   capture.py: of every unit the examples' gradients, or its inputs and
                                                output gradients, as kernels.py chose
    optimizer.step()                            direction.py: q from the optimizer's move and the target's gradient,
                                                tangent/contraction.py: phi_i = <g_i, q>,
                                                valuation.py: both for every target, and the books
                                                ledger/: step, id, target, value
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inrun.capture import Capture
from inrun.captured import Captured
from inrun.compiled import GRAPHS
from inrun.credit import Credit
from inrun.direction import displacements, scheme_of
from inrun.errors import InrunError, NonFiniteError
from inrun.formed import Formed, Pool
from inrun.game import Game
from inrun.gradient import Received, same, sample, square
from inrun.kernels import Kernel, Kernels
from inrun.ledger import LedgerWriter
from inrun.packed import as_packed
from inrun.parallel import ProcessError, Processes, Report, gradient_of, is_piece, local
from inrun.parts import parts_of
from inrun.plan import Plan, plan_of
from inrun.provenance import coverage, describe
from inrun.replaying.recording import Recorder, Recording
from inrun.scratch import Scratch, free_memory, gib
from inrun.step import Microbatch, Step, as_ids
from inrun.target import DOUBLE_BACKWARD, Evaluation, Loss, Target, saved_plainly
from inrun.units import Units, trained_parameters
from inrun.update import CoupledUpdate, Moved, Update, check_move, unwrapped, update_of
from inrun.valuation import Account, Valued, train_loss

LARGEST = 1e19  # of a gradient: its square is no number of float32 any more
_CHECKS = 100  # steps at most until one is long enough to hold the displacement against it; in bfloat16 few are


class Attributor:
    """Values every training example of a run while it trains (In-Run Data Shapley; design, section 2).

    Args:
        model: the model that is trained. Its tensor inputs hold the examples in dimension `batch_dim`.
        optimizer: an optimizer of torch.optim over parameters of the model (docs/optimizers.md lists them, and how to
            add one), or several, each with parameters of its own, that step one after another.
        targets: name -> one batch (tensor, tuple or mapping), or a list or DataLoader of batches used in rotation, one
            a step.
        loss: loss(model, batch) -> scalar tensor, the mean loss of a target's batch; it is evaluated in eval mode.
        scheme: "path" (Aumann-Shapley along the optimizer's move), "first" or "second" (the paper's two orders).
        nodes: how many points of the path the target's gradient is taken at, each step; or "adaptive": 1, then 3, 9,
            ... up to `max_nodes`, until the values add up to the measured drop of the target's loss, to `tolerance` of
            it.
        rule: where the nodes lie: in the middles of equal pieces ("midpoint"), or where Gauss and Legendre put them.
        refresh: with "first", take a target's gradient every so many steps and use it for all of them. (Where
            `audit_every` is a multiple of it, audits meet new gradients only, and do not show what older ones cost.)
        target_batches: how many of a target's batches its loss at a step is the mean of. Several processes share them
            out: with as many as there are processes, each has one.
        momentum: "account" books what old momentum does to an account of its own; "credit" pays it to the examples
            whose gradients it holds, so that a step's values are final only when its momentum has died away
            (inrun.credit).
        memory: bytes that may be kept of examples' gradients, of one step or under "credit" of past ones, before what
            is beyond goes to disk; "auto" is half of the host memory that is free.
        kernel: how <g_i, q> is had of a unit (docs/kernels.md): "tangent" runs it once more for every target;
            "perexample" forms g_i in the backward pass; "ghost", for "first" with SGD, forms neither; "auto" takes
            what is cheapest, unit by unit, by their shapes. `plan()` shows it.
        ledger: a folder for the values, or None to keep only `last`. One that holds a run is refused unless `resume`.
        resume: continue the run in the ledger's folder; `load_state_dict` must follow, and cuts the ledger back.
        audit_every: on every k-th step, measure the target's loss before and after the step, and book what the values
            do not explain (0: never).
        audit_permutations: on the audited steps also play the step's real game: in full up to 12 examples, beyond by
            this many random orders; 0: do not (see `inrun.audit`).
        nonfinite: when a gradient or a target's loss is not finite, "stop" raises before the optimizer moves, "skip"
            books the step as skipped.
        batch_dim: the dimension of the model's inputs that holds the examples.
        token_values: keep the value of every token, too (`Step.token_values`; docs/parts.md). Every unit is then valued
            by the kernel `tangent`, and needs an output with a dimension of time.
        by_module: keep the values in parts, too, by the module that they came through (`Step.by_module`): True for a
            part for every module that owns parameters, or patterns of parameters' names such as "*.attn.*", in a list
            or by the name of the part. A parameter belongs to the first that it matches, and to "other" if it matches
            none.
        replayable: keep what `inrun.replay` needs in the ledger's folder, to value the run's examples once more by its
            end, for any target: batches, random states, checkpoints (docs/replay.md); `Recording(...)` says how many of
            them, and what is done to gradients between backward and step. Units are then valued by the kernel
            `tangent`, so that training is bit for bit what can be repeated.
        within: on several processes, the DistributedDataParallel that holds the model, where it was wrapped around more
            than the model.

    The model, the optimizer and the random state are left as they are: with kernel="tangent" training is bit for bit
    what it is without, and with the others but for the order in which the weights' gradients are added up.
    `last` is the newest step whose values are final, `train_loss` that of the step just taken, `total` the sum of all
    values so far, in nats, over all targets. `rows` are the books of the steps that the newest one made final, of each
    by target what its row of the ledger's steps table says.

    Raises:
        InrunError: an unsupported optimizer, parameters that are not the model's, a frozen model, a target without
            batches or one that does not depend on the model, an unknown scheme, a ledger that holds another run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        targets: Mapping[str, Any],
        loss: Loss,
        *,
        scheme: Literal["path", "first", "second"] = "path",
        nodes: int | Literal["adaptive"] = 1,
        rule: Literal["midpoint", "gauss"] = "midpoint",
        tolerance: float = 0.02,
        max_nodes: int = 9,
        refresh: int = 1,
        target_batches: int = 1,
        momentum: Literal["account", "credit"] = "account",
        memory: int | Literal["auto"] = "auto",
        kernel: Kernel = "auto",
        ledger: str | PathLike[str] | None = None,
        resume: bool = False,
        audit_every: int = 0,
        audit_permutations: int = 0,
        nonfinite: Literal["stop", "skip"] = "stop",
        batch_dim: int = 0,
        token_values: bool = False,
        by_module: bool | Sequence[str] | Mapping[str, str] = False,
        replayable: bool | Recording = False,
        within: nn.Module | None = None,
    ) -> None:
        for name, chosen, known in (
            ("momentum", momentum, ("account", "credit")),
            ("kernel", kernel, ("auto", "tangent", "perexample", "ghost")),
            ("nonfinite", nonfinite, ("stop", "skip")),
        ):
            if chosen not in known:
                raise InrunError(f"{name}={chosen!r} is not known: choose {' or '.join(map(repr, known))}.")
        if audit_every < 0:
            raise InrunError(f"audit_every={audit_every}: give the number of steps between audits, or 0 for none.")
        if audit_permutations < 0 or audit_permutations == 1:
            raise InrunError(f"audit_permutations={audit_permutations}: give two or more, or 0 to play no game.")
        if token_values and kernel not in ("auto", "tangent"):
            raise InrunError(
                f"kernel={kernel!r} has no values of tokens: only 'tangent' has (or 'auto', which takes it)."
            )
        if replayable:
            _check_replayable(ledger, kernel, nonfinite)
        if token_values or replayable:
            kernel = "tangent"
        if memory != "auto" and (isinstance(memory, str) or memory < 0):
            raise InrunError(f"memory={memory!r}: give a number of bytes, or 'auto'.")
        if not targets:
            raise InrunError("no targets: give at least one named validation batch.")
        self._processes = processes = Processes(model, within=within)
        self.model = model = processes.model
        self.optimizers = tuple(map(unwrapped, (optimizer,) if isinstance(optimizer, Optimizer) else optimizer))
        self.step = 0
        self.last: Step | None = None
        self.train_loss: float | None = None
        self.total = 0.0
        self.rows: list[dict[str, dict[str, Any]]] = []
        self._refresh = refresh
        self._nodes = 0 if scheme != "path" else nodes if isinstance(nodes, int) else 1
        self._nonfinite, self._audit_every, self._permutations = nonfinite, audit_every, audit_permutations
        self._updates = {optimizer: update_of(optimizer) for optimizer in self.optimizers}
        self._names = trained_parameters(model, self.optimizers)
        self._check_several(scheme, momentum, kernel, audit_permutations, bool(replayable))
        way = scheme_of(scheme, nodes, rule, tolerance, max_nodes, refresh, self._names, processes)
        self._units = units = Units(model, self._names)
        self._described = units.all
        self._evaluation = evaluation = Evaluation(processes)
        self._targets = [
            Target(name, batches, loss, evaluation, refresh, target_batches) for name, batches in targets.items()
        ]
        for target in self._targets if not processes.sharded else ():  # whose passes take all processes
            found, _ = target.gradient_of(0, 0, list(self._names))  # what cannot be used is refused now, not in mid-run
            target.check_finite(found, 0)
        parts = parts_of(by_module, self._names, type(model).__name__)
        settings = {
            "scheme": scheme,
            "nodes": nodes,
            "rule": rule,
            "momentum": momentum,
            "kernel": kernel,
            "audit_every": audit_every,
            "audit_permutations": audit_permutations,
            **({"refresh": refresh} if refresh != 1 else {}),
            **({"target_batches": target_batches} if target_batches != 1 else {}),
            **({"processes": processes.size} if processes.size != 1 else {}),
            **({"token_values": True} if token_values else {}),
            **({"replayable": True} if replayable else {}),
            **({"modules": parts.names} if parts.names else {}),
            **({"tolerance": tolerance, "max_nodes": max_nodes} if nodes == "adaptive" else {}),
            **({"double_backward": DOUBLE_BACKWARD} if scheme == "second" else {}),
        }
        self._given = f"{settings}, {nonfinite}, {tolerance}, {max_nodes}, {by_module}, {batch_dim}"
        self._kernel, self._token_values = kernel, token_values
        self._room = free_memory() // 2 if memory == "auto" else memory
        folder = None if ledger is None else Path(ledger)
        self._account: Account | Credit
        if momentum == "credit":
            if audit_permutations or nonfinite == "skip" or refresh != 1:
                raise InrunError("momentum='credit' goes with none of audit_permutations=, nonfinite='skip', refresh=.")
            if token_values or by_module:
                raise InrunError("momentum='credit' has no values of tokens or modules: use momentum='account'.")
            scratch = Scratch(self._room, folder)
            self._account = Credit(self._targets, way, units, self._names, list(self._updates.values()), scratch)
        else:
            self._account = Account(self._targets, way, units, processes, parts, token_values)
        self._received = Received(self._names, copying=processes.size > 1)
        self._pending: list[Microbatch] = []
        self._open = False
        self._id_type: type[int] | type[str] | None = None
        self._waiting: _Waiting | None = None
        self._noted = self._closed = False
        self._problem: NonFiniteError | None = None
        self._weights: dict[nn.Parameter, Tensor] = {}  # as they were when gradients were taken ahead
        self._games: dict[str, Game] = {}
        self._checks_left = _CHECKS
        self._ledger: LedgerWriter | None = None
        self._recorder: Recorder | None = None
        if folder is not None:
            run = describe(self.optimizers, units.all, self._targets, **settings)
            self._ledger = LedgerWriter(folder, run, resume=resume, rank=processes.rank, ranks=processes.size)
            if replayable:
                how = replayable if isinstance(replayable, Recording) else Recording()
                self._recorder = Recorder(folder, how, model, self.optimizers, self._names, batch_dim, resume)
        self._at_once = (
            scheme == "first"
            and momentum == "account"
            and kernel != "tangent"
            and not processes.sharded
            and all(type(update).rate is not Update.rate for update in self._updates.values())
        )
        # a checkpoint holds a gradient that later steps use, but not what it was made of; nor does another process
        meets = refresh == 1 and target_batches == 1 and processes.size == 1
        self._kernels = Kernels(
            "tangent" if processes.sharded else kernel,
            units,
            len(targets),
            self._at_once,
            meets,
            None if memory == "auto" else memory,
        )
        self._capture = Capture(processes, units, self._kernels, batch_dim)
        self._met = False
        self._pool = Pool()
        self._scratch = Scratch(0, folder)
        self._hooks = [
            hook
            for optimizer in self.optimizers
            for hook in (
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            )
        ]

    @contextmanager
    def batch(self, ids: Any, data: Any = None) -> Iterator[Microbatch]:
        """Mark the forward and backward passes of one batch; several of them before a step are gradient accumulation.

        Args:
            ids: one id per example, ints or strings: a sequence, or a tensor or array of one dimension. An id may stand
                more than once; its values add up. Or, for packed documents, an id for every token, [batch, time]: a
                tensor, an array or a sequence of sequences. A document's value is then the sum of its tokens' values
                (docs/parts.md), and `last.ids` are the documents, each once for this block. Tokens of no document have
                -1, or None in a list; what went through them is nobody's, and unexplained in the books.
            data: of a replayable run, what the batch's loss is made of, to be kept for `inrun.replay` as it is before
                the block: tensors, numbers, strings, and lists, tuples and mappings of them. None: a replay makes it of
                the ids.

        Raises:
            InrunError: ids of another number than the batch's examples, or of other types; no backward pass in the
                block; gradients that changed since the last block. Of packed documents, also a unit whose output has no
                dimension of time, or in which tokens see later ones of another document.
        """
        if not self._hooks:
            raise InrunError("the attributor is closed or detached: no batch can be valued any more.")
        packed = as_packed(ids)
        found = as_ids(ids) if packed is None else packed.ids
        if packed is not None:
            self._refuse_packed()
        if self._id_type not in (None, type(found[0])):
            raise InrunError(f"ids were {self._id_type.__name__}s before and are {type(found[0]).__name__}s now.")
        self._meet()
        if self._open:
            raise InrunError("a `batch` block was opened inside of another one: close the first before the next.")
        if self._waiting is not None:
            raise InrunError(
                f"{len(self._waiting.remaining)} of {len(self.optimizers)} optimizers have not stepped since the last "
                "batch: step all that the Attributor was given before the next, or discard() what was dropped."
            )
        anywhere = self._processes.any if self._processes.sharded else bool  # each has other parts of the gradient
        if self._pending and self._received.left_out(anywhere):
            self.discard()
        self._games = {}
        if self._recorder is not None:
            self._recorder.begin(self.step, data, first=not self._pending)
        self._open = True
        if not self._pending:
            self._kernels.begin()
            self._problem, self._weights = None, {}
            if self._refresh == 1:
                self._account.forget()  # a block before this one may have failed, and the weights been loaded anew
        examples = len(found) if packed is None else len(packed.documents)
        by_token = packed is not None or self._token_values
        captured = Captured(examples, Formed(examples, self._names, self._pool), packed=packed, by_token=by_token)
        try:
            told = self._processes.waiting()  # a process that has gone shows in the backward
            with told, self._capture.batch(captured, lambda: self._look_ahead(captured)):
                microbatch = Microbatch(found, captured)
                yield microbatch
        finally:
            self._open = False
        if not captured.calls and not captured.formed:
            raise InrunError(
                "no gradient reached the model inside the `batch` block: call the model and loss.backward() both "
                "inside of it (and checkpoint a whole model with use_reentrant=False)."
            )
        self._id_type = type(found[0])
        if self._ledger is not None and self._described is not self._units.all:  # as this forward has shown
            self._described = self._units.all
            self._ledger.describe({"coverage": coverage(self._described)})
        if sum(m.captured.size() for m in (*self._pending, microbatch) if not m.captured.spilled) > self._room:
            self._spill(microbatch)
        if self._recorder is not None:
            self._recorder.add(ids, self._capture.autocast)
        self._pending.append(microbatch)
        self._received.keep()

    def _check_several(
        self, scheme: str, momentum: str, kernel: str, audit_permutations: int, replayable: bool
    ) -> None:
        """Raise InrunError for settings that are for one process, or for weights that are whole."""
        processes = self._processes
        if processes.size > 1 and momentum == "credit":
            raise InrunError("momentum='credit' is for one process: on several use momentum='account'.")
        if processes.size > 1 and replayable:
            raise InrunError("replayable= is for one process: on several leave it out.")
        if processes.size > 1 and audit_permutations:
            raise InrunError("audit_permutations= plays a step's game on one process: on several leave it out.")
        if not processes.sharded:
            return
        if kernel not in ("auto", "tangent"):
            raise InrunError(f"kernel={kernel!r} needs whole weights, and fully_shard has cut them: use 'auto'.")
        if scheme == "second":
            raise InrunError("scheme='second' needs whole weights, and fully_shard has cut them: use scheme='path'.")
        for optimizer, update in self._updates.items():
            if isinstance(update, CoupledUpdate):
                raise InrunError(
                    f"{type(optimizer).__name__} moves whole matrices, and fully_shard has cut the weights: use "
                    "an optimizer that moves every number by itself, or DistributedDataParallel."
                )

    def _meet(self) -> None:
        """With the first batch, see that all processes were given the same."""
        self._processes.check()
        self._processes.step = self.step + 1
        if self._met or self._processes.size == 1:
            return
        targets = ", ".join(
            f"{target.name}: {len(target.batches)} batches ({target.mark()})" for target in self._targets
        )
        self._processes.meet(
            f"{len(self._names)} trained parameters, targets {targets}; settings {self._given}, at step {self.step}"
        )
        self._met = True

    def _refuse_packed(self) -> None:
        """Raise InrunError if documents that are packed cannot have values under these settings."""
        instead = "pack no documents, or give an id for every sequence"
        if isinstance(self._account, Credit):
            raise InrunError(f"momentum='credit' has no values of packed documents: {instead}.")
        if self._permutations:
            raise InrunError(f"audit_permutations= plays with whole examples, not with packed documents: {instead}.")
        if self._kernel not in ("auto", "tangent"):
            raise InrunError(
                f"kernel={self._kernel!r} has no values of packed documents: only 'tangent' has, or 'auto', "
                "which takes it for them."
            )

    def plan(self) -> Plan:
        """Which kernel every unit has, and what a step's attribution costs beyond training and the targets' passes.

        What is shown are the calls of the newest step's batches. `print` it for a table; its times are measured on this
        machine, which takes about a second.

        Raises:
            InrunError: no batch was seen yet.
        """
        if not self._kernels.calls:
            raise InrunError("plan() shows what the newest batches were valued by, and there was none yet.")
        moves = {}
        for optimizer, update in self._updates.items():
            for group in optimizer.param_groups:
                for p in (p for p in group["params"] if p in self._names):
                    # any numbers do for a gradient that is gone: it is only measured how long they take
                    gradient = gradient_of(p)
                    moves[p] = Moved(
                        local(p), local(p) if gradient is None else gradient, _state(optimizer, p), group, update
                    )
        with torch.no_grad():
            return plan_of(self._kernels.calls, moves, len(self._targets), self._at_once, self._nodes)

    def _spill(self, microbatch: Microbatch) -> None:
        """Keep on disk what the step must have of this batch."""
        size, examples = microbatch.captured.size(), microbatch.captured.examples
        note = (
            f"what a step must keep of its batches' gradients is more than memory= allows ({gib(self._room)}): the "
            f"{gib(size)} of a batch of {examples} examples go to disk in {self._scratch.folder}. About "
            f"{int(self._room // (size / examples))} examples a step fit."
        )
        if not self._noted:
            warnings.warn(note, stacklevel=3)
            self._noted = True
        microbatch.captured.spill(self._scratch)

    def _look_ahead(self, captured: Captured) -> None:
        """Ahead of a forward pass: get the target's gradients, if examples' gradients can be contracted with them."""
        step = self.step + 1
        game = self._permutations and self._audit_every and step % self._audit_every == 0
        if not self._at_once or game or captured.formed.ahead is not None:
            return
        self._evaluate_as_trained()
        self._weights = {p: sample(local(p)) for p in self._names}
        try:
            with saved_plainly():
                captured.formed.ahead = self._account.ahead(step, self._capture.watch)
        except NonFiniteError as problem:
            captured.formed.ahead, self._problem = [], problem  # it is the step's, not the forward pass's

    def _evaluate_as_trained(self) -> None:
        self._evaluation.autocast = self._capture.autocast
        # graphs are made after the training's, which then know of no size but its own
        self._evaluation.graphs = GRAPHS and self.step > 0

    def discard(self) -> None:
        """Forget the batches since the last step, for a loop that drops their gradients instead of stepping."""
        for microbatch in self._pending:
            microbatch.captured.release()
        self._pending, self._waiting, self._games = [], None, {}
        self._account.forget()
        if self._recorder is not None:
            self._recorder.discard()

    def _audit(self, permutations: int, seed: int) -> dict[str, Game]:
        if self._open or self._waiting is not None or not self._pending:
            raise InrunError("audit() looks at a step before it is taken: call it between the `batch` and its step().")
        if self._processes.size > 1:
            raise InrunError("audit() plays a step's game on one process: on several, audit_every= measures the books.")
        if permutations < 2:
            raise InrunError(f"audit(permutations={permutations}): give two random orders or more.")
        if any(microbatch.captured.packed is not None for microbatch in self._pending):
            raise InrunError("audit() plays with whole examples, not with packed documents: give an id per sequence.")
        moves = self._moves()
        self._check_finite(moves, _Waiting(set()))
        valued = self._value(self.step + 1, moves, False, permutations, seed)
        self._games = valued.games
        return self._games

    def flush(self) -> None:
        """Make everything booked so far durable, on all processes; call it before writing a checkpoint of this step, on
        every one of them.

        Raises:
            LedgerError: the disk refuses. ProcessError: another process's does, or it has gone.
        """
        problem: InrunError | None = None
        try:
            if self._ledger is not None:
                self._ledger.flush()
            if self._recorder is not None:
                self._recorder.flush()
        except InrunError as refused:
            problem = refused
        elsewhere = self._processes.any(problem is not None)
        if problem is not None:
            raise problem
        if elsewhere:
            raise ProcessError(f"step {self.step}: another process could not write its values: see its output.")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to continue the run: the number of steps done, and under momentum="credit" the
        steps whose values are not final, as tensors and plain values. The ledger is flushed first. To be called on
        every process; what it returns is the same on all.
        """
        if self._pending:
            raise InrunError("state_dict() between a batch and its step: take checkpoints after optimizer.step().")
        self.flush()
        return {"step": self.step, **self._account.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step of `state`: rows of later steps, and of those whose values were not final, are cut
        from the ledger.
        """
        self.discard()
        self.step = int(state["step"])
        self.last = None
        self._account.load_state_dict(state)
        if self._ledger is not None:
            self._ledger.cut(self._account.first_waiting(self.step) - 1)
        if self._recorder is not None:
            self._recorder.cut(self.step)

    def detach(self) -> None:
        """Take every hook off the model and the optimizer; nothing of the attributor stays on them."""
        self._capture.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def close(self) -> None:
        """Detach, and write what is booked. Raises InrunError if a batch still waits for its step."""
        self.detach()
        try:
            self._book(self._account.close())
            if self._recorder is not None and not self._closed:
                self._recorder.close()
        finally:
            self._closed = True
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
        if not self._pending and _moves_nothing(optimizer):  # as a checkpoint loader does, to have the state made
            return
        if not self._pending:
            raise InrunError(
                "optimizer.step() without a `batch` before it: wrap the forward and backward passes in `with "
                "attributor.batch(ids=...)`, or detach() to train on unattributed."
            )
        if self._waiting is None or len(self._waiting.remaining) == len(self.optimizers):
            self._waiting = self._evaluate()  # the first to step: all gradients are there, and no weight has moved
        elif optimizer not in self._waiting.remaining:
            raise InrunError(
                f"{type(optimizer).__name__}.step() was called twice for one batch, while another of the Attributor's "
                "optimizers has not stepped: step each of them once."
            )

    def _moves(self) -> dict[nn.Parameter, Moved]:
        """Every parameter that the optimizers are about to move. Raises InrunError for what values cannot follow."""
        moves = {}
        for optimizer, update in self._updates.items():
            if getattr(optimizer, "grad_scale", None) is not None:
                raise InrunError(
                    "a gradient scaler leaves the unscaling to this fused optimizer, which hides the gradient that it "
                    "receives: call scaler.unscale_(optimizer) before scaler.step(optimizer)."
                )
            for group in optimizer.param_groups:
                late = [p for p in group["params"] if p.grad is not None and p not in self._names]
                if late:
                    raise InrunError(
                        f"the optimizer moves {len(late)} parameter(s) that were frozen, or not yet its own, when the "
                        f"Attributor was attached (the first of shape {tuple(late[0].shape)}): detach() and attach "
                        "again."
                    )
                for p in group["params"]:
                    gradient = gradient_of(p)
                    if gradient is not None:
                        moves[p] = Moved(local(p), gradient, _state(optimizer, p), group, update)
        if not moves:
            raise InrunError(
                "no parameter has a gradient any more: call zero_grad() after optimizer.step(), not before it."
            )
        return moves

    def _evaluate(self) -> "_Waiting":
        """The values of the step that the optimizers are about to take. Changes nothing."""
        self._processes.reshard()  # whole weights may be there of a forward of the user's, and would not move
        step, moves = self.step + 1, self._moves()
        self._evaluate_as_trained()
        waiting = _Waiting(set(self.optimizers))
        audited = self._audit_every > 0 and step % self._audit_every == 0
        ids = [i for microbatch in self._pending for i in microbatch.ids]
        problem = self._problem
        try:
            self._check_finite(moves, waiting)
        except NonFiniteError as found:
            problem = problem or found
        mine = Report(len(ids), train_loss(self._pending), problem is None, self._books())
        waiting.told = told = self._processes.report(mine)
        try:
            if problem is not None:
                raise problem
            if not told.finite:
                raise NonFiniteError("the gradient of another process is not finite")
            if not same([(sample(local(p)), was) for p, was in self._weights.items()]):
                raise InrunError(
                    "the weights were changed between the forward pass and the step (as for sharpness-aware training, "
                    "or noise), but under scheme='first' with SGD the target's gradient is taken ahead of the backward "
                    "pass: give the Attributor kernel='tangent', which takes it at the step."
                )
            waiting.valued = self._value(step, moves, audited, self._permutations if audited else 0)
        except NonFiniteError as problem:
            if self._nonfinite == "stop":
                raise NonFiniteError(
                    f"step {step}: {problem}. Nothing was moved and nothing booked. Look at the batch with the ids "
                    f"{ids[:8]}, lower the learning rate, or give nonfinite='skip' to book such steps as skipped."
                ) from None
            waiting.seen.clear()
            waiting.valued = Valued(Step(step, ids, {}, {}, told.loss, skipped=True))
            return waiting
        if self._recorder is not None:
            self._recorder.check_gradient(step, *self._received.norms(moves), moves)
        waiting.valued.step = replace(waiting.valued.step, train_loss=told.loss)
        if audited or self._checks_left:
            self._checks_left = max(self._checks_left - 1, 0)
            waiting.before = {p: moved.weight.clone() for p, moved in moves.items()}
            waiting.expected = displacements(moves, 1.0)
        return waiting

    def _books(self) -> str:
        """By what the step's books are kept, which the processes add up entry by entry."""
        if self._processes.size == 1:
            return ""
        called = [call.unit for microbatch in self._pending for call in microbatch.captured.calls]
        groups, _ = self._units.joined(called)
        units = self._units.known(called) if self._processes.sharded else ()  # gathered one by one
        return str([sorted(self._names[p] for p in group.parameters) for group in groups] + [u.name for u in units])

    def _check_finite(self, moves: Mapping[nn.Parameter, Moved], waiting: "_Waiting") -> None:
        """Raise NonFiniteError if a gradient is not finite; keep the squares, by which a change would be seen."""
        squares = self._received.receive(moves)
        if not bool(torch.stack(list(squares.values())).isfinite().all()):
            largest = float(
                torch.stack([m.gradient.abs().max().double() for m in moves.values() if m.gradient.numel()]).max()
            )
            if not largest < LARGEST:
                size = f"as large as {largest:.0e}, which overflows when squared"
                raise NonFiniteError(f"the gradient is {size if math.isfinite(largest) else 'not finite'}")
        for optimizer in self.optimizers:
            if not any(group.get("nesterov") for group in optimizer.param_groups):
                # torch's foreach SGD adds Nesterov's momentum into the gradient itself
                mine = [p for group in optimizer.param_groups for p in group["params"] if p in moves]
                waiting.seen[optimizer] = [(moves[p].gradient, moves[p].gradient._version, squares[p]) for p in mine]

    def _value(
        self, step: int, moves: Mapping[nn.Parameter, Moved], audited: bool, permutations: int, seed: int = 0
    ) -> Valued:
        for microbatch in self._pending:
            for call in microbatch.captured.calls:
                call.check_inputs()
        device = next(iter(moves)).device.type
        with torch.autocast(device, enabled=False), torch.no_grad():  # what is around the optimizer's step is not ours
            return self._account.value(step, self._pending, moves, self._received, audited, permutations, seed)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting = self._waiting
        if waiting is None:
            return
        waiting.remaining.discard(optimizer)
        valued = waiting.valued
        if not waiting.remaining:
            for microbatch in self._pending:
                microbatch.captured.release()
            # the optimizers have moved: the step counts as done, whatever cannot be checked or written now
            self.step, self._pending, self._waiting = valued.step.step, [], None
        look = bool(waiting.expected)  # what is written past the versions is looked for now and then
        if any((look or g._version != at) and square(g) != was for g, at, was in waiting.seen.get(optimizer, [])):
            raise InrunError(
                f"step {valued.step.step}: the gradients were changed inside of optimizer.step() or between two "
                "optimizers' steps (a step hook that clips, most likely), after the values were computed from them, so "
                "its values would be wrong. Change them before step()."
            )
        if waiting.remaining:
            return
        rates = [group["lr"] for one in self.optimizers for group in one.param_groups]
        eps = max((torch.finfo(rate.dtype).eps for rate in rates if isinstance(rate, Tensor)), default=0.0)
        for p, expected in waiting.expected.items():
            # a step of no length, as under a rate of zero, shows nothing
            if check_move(self._names[p], waiting.before[p], local(p), expected, eps):
                self._checks_left = 0
        self.train_loss = valued.step.train_loss
        self.total += sum(one["value"] for one in valued.rows.values())
        row = {
            "learning_rate": max(map(float, rates)),
            "train_loss": valued.step.train_loss,
            "examples": waiting.told.examples,
        }
        for name, game in self._games.items():
            valued.rows.setdefault(name, {}).update(game.row())
        self._games = {}
        if self._recorder is not None:
            self._recorder.step(valued.step.step, valued.step.train_loss)
        self._book(self._account.finished(valued, row))

    def _book(self, final: Sequence[Valued]) -> None:
        """Steps whose values will not change any more, into `last` and the ledger."""
        problems = []
        self.rows = [valued.rows for valued in final]
        for valued in final:
            self.last = done = valued.step
            if self._ledger is not None:
                values = {name: v.numpy() for name, v in done.values.items()}
                try:
                    parts = {t: {name: v.numpy() for name, v in of.items()} for t, of in done.by_module.items()}
                    tokens = {t: [v.numpy() for v in of] for t, of in valued.tokens.items()}
                    rows = list(valued.rows.values()) if self._processes.first else []  # one for all processes
                    self._ledger.book(done.step, done.ids, values, rows, parts, tokens)
                except InrunError as problem:  # of an earlier step's writing: this one is booked, and so are the next
                    problems.append(problem)
        if problems:
            raise problems[0]


def _check_replayable(ledger: object, kernel: str, nonfinite: str) -> None:
    """Raise InrunError for settings under which steps cannot be repeated."""
    if ledger is None:
        raise InrunError("replayable= keeps what a replay needs in the ledger's folder: give ledger=.")
    if kernel not in ("auto", "tangent"):
        raise InrunError(
            f"kernel={kernel!r} adds the examples' gradients up in an order of its own, in which a replay would not: "
            "with replayable= use 'tangent', or 'auto', which takes it."
        )
    if nonfinite == "skip":
        raise InrunError("nonfinite='skip' goes on through steps that nothing can be pulled back through: use 'stop'.")


def _state(optimizer: Optimizer, p: nn.Parameter) -> Mapping[str, Any]:
    """What this process holds of an optimizer's state of a parameter."""
    state: Mapping[str, Any] = optimizer.state.get(p, {})
    if not is_piece(p):
        return state
    return {name: local(x) if isinstance(x, Tensor) else x for name, x in state.items()}


def _moves_nothing(optimizer: Optimizer) -> bool:
    """Whether it is about to take a step of no length on gradients of zero."""
    return all(
        float(group["lr"]) == 0 and not any(bool(g.any()) for g in map(gradient_of, group["params"]) if g is not None)
        for group in optimizer.param_groups
    )


@dataclass
class _Waiting:
    """A step between the optimizers' hooks: evaluated, but not yet taken by all of them."""

    remaining: set[Optimizer]
    valued: Valued = field(default_factory=lambda: Valued(Step(0, [], {}, {})))
    told: Report = field(default_factory=lambda: Report(0, None, True))  # of all processes
    seen: dict[Optimizer, list[tuple[Tensor, int, Tensor]]] = field(default_factory=dict)
    before: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    expected: dict[nn.Parameter, Tensor] = field(default_factory=dict)


def audit(attributor: Attributor, permutations: int = 200, seed: int = 0) -> dict[str, Game]:
    """The real game of the step that is about to be taken, by target: call it after backward(), before step().

    The Shapley values of the batch's examples in the game of design 2.1, played with the optimizer's real move and the
    target's real loss: in full up to 12 examples, by random orders and with a standard error beyond. What it finds is
    booked with the step. Nothing is disturbed: weights, optimizer, gradients and random states are as before.

    Args:
        permutations: random orders of the examples, two or more, where there are more than 12.

    Returns:
        target -> `inrun.game.Game`: the Shapley values, the scheme's own, and how far they are apart.

    Raises:
        InrunError: no batch waits for its step, or a step is being taken.
    """
    return attributor._audit(permutations, seed)
