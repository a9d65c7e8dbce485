"""The processes of a run: what each of them holds, what they tell one another, and how they share the targets' work.

The only file that calls torch.distributed, and never from a constructor or a destructor. One process is the case of a
list of one: it has nothing to exchange.

Every process captures its own examples and books their values. What is exchanged at a step, in this order:

    report       how the step stands with everyone (a few numbers, between processors)
    totals       the targets' gradients, which the processes share out (replicated weights; sharded ones exchange
                 theirs as in training)
    whole        q, unit by unit (sharded weights only)
    total        the sums that the books are checked by
"""

import hashlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrun.errors import InrunError

T = TypeVar("T")

_BUCKET = 2**24  # entries that are sent together
_ROLL_CALL = 5.0  # seconds for those who are still there to say so
# wrappers of a model that do otherwise than DistributedDataParallel
_UNKNOWN = {"FullyShardedDataParallel", "DeepSpeedEngine", "DataParallel"}


class ProcessError(InrunError):
    """Another process of the run has gone, did not come, or stopped with an error of its own."""


@dataclass(frozen=True)
class Report:
    """How a step stands with one process, or with all of them."""

    examples: int
    loss: float | None  # of all: the mean, as of gradients
    finite: bool
    books: str = ""  # by what they are kept


class Processes:
    """The processes that train one model together, as this one sees them.

    Args:
        given: the model as the user has it: itself, or in DistributedDataParallel, or sharded by `fully_shard`, and any
            of it compiled by torch.compile.
        within: the DistributedDataParallel that holds the model, where it is around more than it.
        alone: this process has the model to itself, whatever others there are.

    `model` is what is inside of it, `called` what the targets' losses call: as it was compiled, but outside of
    DistributedDataParallel, which waits for every process in its forward. `rank` and `size` are this process's number
    and how many there are. `sharded`: the weights are.

    Raises:
        InrunError: a way to train on several processes that values cannot follow.
    """

    def __init__(self, given: nn.Module, *, within: nn.Module | None = None, alone: bool = False) -> None:
        self.model, self.called, replicas = _unwrapped(given)
        if within is not None:
            around, _, replicas = _unwrapped(within)
            if replicas is None or self.model not in around.modules():
                raise InrunError("within= is no DistributedDataParallel that holds the model.")
        several = not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self._replicas = replicas
        self._group: Any = None if replicas is None else replicas.process_group  # None: all that there are
        self.step = 1  # that is being taken
        self._control: Any = None  # the same processes, between processors: so that no device is waited for
        kinds = {c.__name__ for m in self.model.modules() for c in type(m).__mro__}
        if kinds & _UNKNOWN:
            raise InrunError(
                f"a model in {', '.join(kinds & _UNKNOWN)} cannot be valued: use DistributedDataParallel, or "
                "torch.distributed.fsdp.fully_shard."
            )
        self._cut: list[Any] = [m for m in self.model.modules() if is_sharded(m)]
        if self._cut and torch.__version__ < "2.13":
            raise InrunError(
                f"weights that fully_shard has cut can be valued from torch 2.13 on; this is {torch.__version__}: "
                "update torch, or use DistributedDataParallel."
            )
        self._groups = [group for m in self._cut for group in m._get_fsdp_state()._fsdp_param_groups]
        self.reshard()
        # the precision in which modules meet the whole of their sharded parameters
        self.met_in: dict[Tensor, torch.dtype] = {
            of.sharded_param: group.mp_policy.param_dtype or of.sharded_param.dtype
            for group in self._groups
            for of in group.fsdp_params
        }
        self.sharded = bool(self._cut)
        self._check_pieces()
        if replicas is not None:
            self._check_replicas(replicas)
        elif several and not self.sharded:
            raise InrunError(
                f"there are {self.size} processes, but the model is neither in DistributedDataParallel nor sharded by "
                "fully_shard, so it is not known how they share the work: give the Attributor the wrapped model, "
                "or within= the wrapped module that holds it. (A stage of a pipeline cannot be valued, nor gradients "
                "that are averaged by hand.)"
            )

    def _check_pieces(self) -> None:
        """Raise InrunError for weights in pieces that are not those of `fully_shard` over all processes."""
        for name, p in self.model.named_parameters():
            if not is_piece(p):
                if self.sharded and p.requires_grad:
                    raise InrunError(
                        f"{name}: it is trained, but not sharded, in a model that fully_shard shards: freeze it "
                        "(requires_grad_(False)), or shard it too."
                    )
                continue
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise InrunError(
                    f"{name}: a hook runs when its gradient is there (an optimizer that steps in the backward pass, "
                    "most likely), and gradients of targets come to sharded weights in the same place: step after the "
                    "backward pass."
                )
            mesh: Any = p.device_mesh  # type: ignore[attr-defined]
            places = [type(place).__name__ for place in p.placements]  # type: ignore[attr-defined]
            if not self.sharded or places[:-1] not in ([], ["Replicate"]) or places[-1] != "Shard":
                raise InrunError(
                    f"{name} is laid out as ({', '.join(places)}) over the processes: tensor and pipeline parallel "
                    "runs cannot be valued. Use fully_shard over all processes, or DistributedDataParallel."
                )
            if mesh.size() != self.size:
                raise InrunError(f"{name} is shared out over {mesh.size()} of {self.size} processes: {_OTHERWISE}")

    def _check_replicas(self, replicas: Any) -> None:
        """Raise InrunError for a DistributedDataParallel that values cannot follow."""
        if self.sharded:
            raise InrunError("a model both in DistributedDataParallel and sharded by fully_shard cannot be valued.")
        if (held := replicas.process_group.size()) != self.size:
            raise InrunError(
                f"the model is in DistributedDataParallel over {held} of {self.size} processes: {_OTHERWISE}"
            )
        for name, m in self.model.named_modules():
            if isinstance(m, nn.SyncBatchNorm):
                raise InrunError(
                    f"{name}: SyncBatchNorm mixes the examples of all processes, and waits for them in its forward. "
                    "Use BatchNorm in eval mode, or a norm of single examples."
                )

    def check(self) -> None:
        """Raise InrunError where the processes do not all take part in every step."""
        if self._replicas is not None and self._replicas._join_config.enable:
            raise InrunError(
                "DistributedDataParallel.join() lets processes without data drop out, and values need all of them at "
                "every step: give every process a batch at every step (DistributedSampler pads or drops the rest)."
            )

    # what a process holds

    @property
    def first(self) -> bool:
        """Whether this process writes what is one for all."""
        return self.rank == 0

    @property
    def share(self) -> float:
        """What a gradient that is made here counts in the one that optimizers receive: their mean, unless fully_shard's
        divisor was set (set_gradient_divide_factor).
        """
        factors = {of.gradient_divide_factor or float(self.size) for of in self._groups} or {float(self.size)}
        if len(factors) > 1:
            raise InrunError(
                f"gradients of parts of the model are divided by different numbers ({sorted(factors)}), so that they "
                "are of no one loss: call set_gradient_divide_factor() with one number for all."
            )
        return 1.0 / float(factors.pop())

    def copies(self, p: nn.Parameter) -> float:
        """How many processes hold the same piece of a parameter."""
        if not is_piece(p):
            return float(self.size)
        mesh: Any = p.device_mesh  # type: ignore[attr-defined]
        pieces: int = mesh.size(mesh.ndim - 1)
        return self.size / pieces

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of a list of work."""
        return list(items[self.rank :: self.size])

    def together(self, items: int) -> Iterator[tuple[int, float]]:
        """The rounds in which sharded weights do so many pieces of work: in each the piece that this process does, and
        what it counts, so that what all of them make, added up as gradients are, is the mean of the pieces.
        """
        share = self.share
        for first in range(0, items, self.size):
            there = min(self.size, items - first)
            place = self.rank % there
            doing = self.size // there + (place < self.size % there)
            yield first + place, 1 / (share * items * doing)

    def reshard(self) -> None:
        """Drop the whole weights that a forward pass left behind: they are not to be met when the pieces have moved."""
        for m in self._cut:
            m.reshard()

    def abandon(self) -> None:
        """Have fully_shard forget a forward pass that failed on its way (from torch 2.13 on)."""
        for m in self._cut:
            forget = getattr(m, "reset_iter_state", None)
            if forget is not None and m._get_fsdp_state()._is_root:
                forget()

    # what the processes tell one another

    def meet(self, what: str) -> None:
        """Hold what every process was given against the first one's, when the run begins.

        Raises:
            InrunError: they differ.
        """
        marks = self._numbers([_mark(what)])
        others = [r for r, its in enumerate(marks) if its != marks[0]]
        if others:
            raise InrunError(
                f"process {_listed(others)} was given another model, other targets or settings than process 0 (this is "
                f"process {self.rank}, with {what}): every process must attach to the same, with all batches of the "
                "targets."
            )

    def report(self, mine: Report) -> Report:
        """How a step stands with all processes.

        Raises:
            ProcessError: another process is at another step, or has gone. InrunError: it keeps other books, which
                cannot be added to these.
        """
        if self.size == 1:
            return mine
        loss = math.nan if mine.loss is None else mine.loss
        rows = self._numbers([float(self.step), float(mine.examples), loss, float(mine.finite), _mark(mine.books)])
        elsewhere = {r: int(row[0]) for r, row in enumerate(rows) if row[0] != self.step}
        if elsewhere:
            raise ProcessError(
                f"this process ({self.rank}) is at step {self.step}, "
                + ", ".join(f"process {r} at step {at}" for r, at in elsewhere.items())
                + ": every process must load the same checkpoint, and they must step together."
            )
        others = [r for r, row in enumerate(rows) if row[4] != rows[0][4]]
        if others:
            raise InrunError(
                f"step {self.step}: process {_listed(others)} values the parameters by other modules than process 0, "
                f"which cannot be added up (this is process {self.rank}): its batches are of another structure (an "
                "input that only some have), in which the model uses a parameter otherwise. Give all processes inputs "
                "of one structure, or freeze what is used in both ways (requires_grad_(False))."
            )
        losses = [row[2] for row in rows]
        mean = None if any(map(math.isnan, losses)) else sum(losses) / self.size
        return Report(sum(int(row[1]) for row in rows), mean, all(row[3] for row in rows), mine.books)

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        return here if self.size == 1 else any(row[0] for row in self._numbers([float(here)]))

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, the same on all of them."""
        if self.size > 1:
            x = x.contiguous()
            with self.waiting():
                dist.all_reduce(x, group=self._group)
        return x

    def totals(self, parts: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """For lists of tensors shaped as `like`, the sums over the processes; None where none of them has one."""
        if self.size == 1:
            return [list(of) for of in parts]
        here = torch.tensor([[x is not None for x in of] for of in parts], dtype=torch.float32, device=like[0].device)
        there = self.total(here).tolist()
        found: list[list[Tensor | None]] = [[None] * len(like) for _ in parts]
        wanted = [(i, j) for i, row in enumerate(there) for j, any_has in enumerate(row) if any_has]
        for some in _buckets(wanted, like):
            pieces = [parts[i][j] for i, j in some]
            given = [torch.zeros_like(like[j]) if x is None else x for x, (_, j) in zip(pieces, some, strict=True)]
            flat = torch.cat([x.reshape(-1) for x in given])
            for (i, j), summed in zip(some, torch.split(self.total(flat), [x.numel() for x in given]), strict=True):
                found[i][j] = summed.view(like[j].shape)
        return found

    def as_met(self, p: Tensor, piece: Tensor) -> Tensor:
        """`whole`, in bfloat16 where modules meet the parameter so: half as much is sent."""
        return self.whole(p, piece.bfloat16() if self.met_in.get(p) is torch.bfloat16 else piece)

    def whole(self, p: Tensor, piece: Tensor) -> Tensor:
        """A tensor laid out as the parameter, of which this process holds a piece."""
        if not is_piece(p):
            return piece
        from torch.distributed.tensor import DTensor

        x = DTensor.from_local(
            piece,
            p.device_mesh,  # type: ignore[attr-defined]
            p.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )
        with self.waiting():
            return x.full_tensor()

    def piece(self, p: Tensor, whole: Tensor) -> Tensor:
        """The counterpart of `whole`: what of it this process holds."""
        if not is_piece(p):
            return whole
        from torch.distributed.tensor import distribute_tensor

        found = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]
        return local(found).clone()

    # below

    def _open(self) -> None:
        """The group in which processors talk, made when it is first used, by all processes."""
        if self._control is None:
            with self.waiting():
                self._control = dist.new_group(backend="gloo", timeout=self._patience())

    def _patience(self) -> timedelta:
        """How long the processes wait for one another, as init_process_group was told."""
        device = next(self.model.parameters()).device
        found: timedelta = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
        return found

    def _numbers(self, mine: Sequence[float]) -> list[list[float]]:
        """Every process's numbers, by rank."""
        self._open()
        here = torch.tensor(mine, dtype=torch.float64)
        rows = [torch.empty_like(here) for _ in range(self.size)]
        with self.waiting():
            dist.all_gather(rows, here, group=self._control)
        return [row.tolist() for row in rows]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block, say who is missing when this process waits for others in vain."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            between_them = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
            if self.size == 1 or not between_them:
                raise
            here = self._roll_call()
            missing = [r for r in range(self.size) if r not in here]
            who = (
                f"process {_listed(missing)} of {self.size} has gone, or does something else"
                if missing
                else ("the processes are all there, but do different things")
            )
            raise ProcessError(
                f"step {self.step}: {who} (this is process {self.rank}: {_first_line(error)}). See the output of "
                "the missing process; then start the run again from its last checkpoint."
            ) from error

    def _roll_call(self) -> set[int]:
        """The processes that have met the same error, and say so."""
        store = dist.distributed_c10d._get_default_store()
        here = {self.rank}
        try:
            store.set(f"inrun/here/{self.rank}", "yes")
            until = time.monotonic() + _ROLL_CALL
            while len(here) < self.size and time.monotonic() < until:
                here |= {r for r in range(self.size) if r not in here and store.check([f"inrun/here/{r}"])}
                time.sleep(0.1)
        except (RuntimeError, dist.DistError):  # the process that keeps the store has gone: it is among the missing
            return here
        return here


_OTHERWISE = (
    "runs in which the processes differ otherwise than in their data (tensor, pipeline, context, expert parallel) "
    "cannot be valued. Use fully_shard or DistributedDataParallel over all processes."
)


def local(x: Tensor) -> Tensor:
    """What of a tensor this process holds, in the same memory and without a gradient: all, unless it is sharded."""
    x = x.detach()
    if not is_piece(x):
        return x
    with torch.no_grad():
        found: Tensor = x.to_local()  # type: ignore[attr-defined]
        return found


def is_sharded(m: nn.Module) -> bool:
    """Whether `fully_shard` was called with the module."""
    return any(c.__name__ == "FSDPModule" for c in type(m).__mro__)


def gradient_of(p: nn.Parameter) -> Tensor | None:
    """What this process holds of a parameter's gradient."""
    return None if p.grad is None else local(p.grad)


def in_place_of(p: nn.Parameter, now: Any) -> bool:
    """Whether what a module holds now is the parameter, or the whole of one that is sharded."""
    return now is p or (is_piece(p) and isinstance(now, Tensor) and not is_piece(now) and now.shape == p.shape)


def _unwrapped(given: nn.Module) -> tuple[nn.Module, nn.Module, Any]:
    """The model itself; what of it may be called by one process alone; and the DistributedDataParallel around it."""
    called: nn.Module = given
    replicas = None
    while True:
        if isinstance(given, nn.parallel.DistributedDataParallel):
            replicas, given = given, given.module
            called = given
        elif type(given).__name__ == "OptimizedModule":  # of torch.compile(model)
            given = cast(nn.Module, given._modules["_orig_mod"])
        else:
            return given, called, replicas


def is_piece(x: Tensor) -> bool:
    """Whether this process holds a part of the tensor."""
    tensors = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return tensors is not None and isinstance(x, tensors.DTensor)


def _buckets(wanted: Sequence[tuple[int, int]], like: Sequence[Tensor]) -> Iterator[list[tuple[int, int]]]:
    """The places in lists of tensors shaped as `like`, in parts that are sent together: of one type and device."""
    some: list[tuple[int, int]] = []
    size = 0
    for at in wanted:
        x = like[at[1]]
        if some and (size + x.numel() > _BUCKET or _kind(x) != _kind(like[some[-1][1]])):
            yield some
            some, size = [], 0
        some.append(at)
        size += x.numel()
    if some:
        yield some


def _kind(x: Tensor) -> tuple[torch.dtype, torch.device]:
    return x.dtype, x.device


def _mark(what: str) -> float:
    """A number for a text."""
    return float(int.from_bytes(hashlib.sha256(what.encode()).digest()[:6], "big"))  # exact as a float64


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


ALONE = Processes(nn.Identity(), alone=True)
