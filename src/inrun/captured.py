"""What a batch block captured: the calls of units, and the gradients that units formed by themselves."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inrun.errors import InrunError
from inrun.formed import Formed
from inrun.gradient import wide
from inrun.packed import Packed
from inrun.rows import Rows
from inrun.scratch import Kept, Scratch
from inrun.state import Before
from inrun.tangent.generic import in_mode
from inrun.timeline import INSTEAD, Time
from inrun.trees import mapped, tensors
from inrun.units import Unit


@dataclass(eq=False)
class Call:
    """One call of a unit: what went in, and by output leaf whose rows they are and the gradient that came back."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    autocast: torch.dtype | None
    before: Before | None
    versions: list[int]
    rows: list[Rows | None]
    gradients: list[Tensor | None]
    spilled: bool = False
    late: bool = False  # its examples' gradients are formed at the step
    met_in: Mapping[Tensor, torch.dtype] = field(default_factory=dict)  # of sharded parameters
    ended: bool = False  # what reaches its outputs now is of another backward pass
    times: tuple[Time | None, ...] = ()  # where the tokens stand in every output, if they are asked for

    @cached_property
    def gradient_norms(self) -> list[Tensor | None]:
        """The norm of every gradient, for all targets once."""
        return [None if gradient is None else gradient.norm(dtype=wide(gradient.dtype)) for gradient in self.gradients]

    @property
    def device(self) -> torch.device:
        """Where the unit is."""
        return next(iter(self.unit.parameters.values())).device

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs, on the device again if they were moved off it."""
        if not self.spilled:
            return self.args, self.kwargs
        args, kwargs = mapped(lambda x: x.to(self.device), (self.args, self.kwargs))
        return args, kwargs

    @contextmanager
    def again(self) -> Iterator[None]:
        """The unit inside the block as it was in the call: in its mode, under its autocast.

        Raises InrunError where it cannot be run again.
        """
        cast = torch.autocast(
            self.device.type, self.autocast or torch.bfloat16, self.autocast is not None, cache_enabled=False
        )
        with in_mode(self.unit.module, self.training), cast:
            try:
                yield
            except (InrunError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise InrunError(
                    f"{self.unit.name}: it cannot be run again on what it was called with ({type(error).__name__}: "
                    f"{error}). A module may be that keeps something of one call for the next, other than in a "
                    "buffer. Make it a buffer, or freeze the module (requires_grad_(False))."
                ) from error

    def check_times(self, examples: int, tokens: int) -> None:
        """Raise InrunError if an output that the loss depends on does not have so many tokens in each example."""
        for gradient, rows, time in zip(self.gradients, self.rows, self.times, strict=True):
            if gradient is None or rows is None:
                continue
            if time is None:
                raise InrunError(
                    f"{self.unit.name}: its output of shape {tuple(gradient.shape)} has no dimension of time, so that "
                    f"what goes through it belongs to no token. {INSTEAD}"
                )
            if not time.fits(gradient, rows, examples, tokens):
                raise InrunError(
                    f"{self.unit.name}: its output of shape {tuple(gradient.shape)} for {examples} examples of "
                    f"{tokens} tokens is laid out otherwise than when the model was run to find out which dimension is "
                    "time. A forward whose layout changes cannot be valued by token."
                )

    def check_inputs(self) -> None:
        """Raise InrunError if an input was overwritten since the call: the values would be of other numbers."""
        for x, version in zip(tensors((self.args, self.kwargs)), self.versions, strict=True):
            check_version(self.unit, x, version)


def check_version(unit: Unit, x: Tensor, version: int) -> None:
    """Raise InrunError if an input of the unit was overwritten since it had this version."""
    if x._version != version:
        raise InrunError(
            f"{unit.name}: an input of this module was changed in place after it was used, so its values cannot be "
            "computed. Use the out-of-place operation there, or load the next batch into other memory."
        )


@dataclass(eq=False)
class Captured:
    """What one `batch` block saw: the gradients that units formed, and the calls of others that one reached.

    `examples` are the model's, which may be sequences of `packed` documents. `by_token`: every token has a value; there
    are `time` of them in an example, once the model was called.
    """

    examples: int
    formed: Formed
    calls: list[Call] = field(default_factory=list)
    cast: bool = False  # a call was under autocast
    packed: Packed | None = None
    by_token: bool = False
    time: int | None = None
    _spilled: tuple[Scratch, Kept] | None = None

    @property
    def valued(self) -> int:
        """How many values there are: one for each document if they are packed, else for each example."""
        return self.examples if self.packed is None else len(self.packed.ids)

    @property
    def spilled(self) -> bool:
        return self._spilled is not None

    def _tensors(self) -> list[Tensor]:
        """All that is kept until the step, each once."""
        kept = [*self.formed.kept.values()]
        for call in self.calls:
            kept += tensors((call.args, call.kwargs, call.gradients))
        return list({id(x): x for x in kept}.values())

    def size(self) -> int:
        """Bytes that are kept until the step."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self._tensors()}
        return sum(storages.values())

    def spill(self, scratch: Scratch) -> None:
        """Move all that is kept off the device, or to disk. Raises InrunError if there is no room."""
        for call in self.calls:
            call.check_inputs()
        kept = self._tensors()
        held = scratch.put({(None, str(k)): x for k, x in enumerate(kept)})
        moved = {id(x): held.tensors[None, str(k)] for k, x in enumerate(kept)}

        def move(x: Any) -> Any:
            return moved.get(id(x), x)

        for call in self.calls:
            call.args, call.kwargs, call.gradients = mapped(move, (call.args, call.kwargs, call.gradients))
            call.spilled = True
            call.versions = [x._version for x in tensors((call.args, call.kwargs))]
        self.formed.replace({p: move(g) for p, g in self.formed.kept.items()})
        self._spilled = scratch, held

    def release(self) -> None:
        """Nothing of this batch is read any more."""
        self.formed.release()
        self.calls = []
        if self._spilled is not None:
            scratch, held = self._spilled
            scratch.drop(held)


class Hook:
    """A hook that stays with its model: a copy or a pickle of the model gets one that does nothing, and is nobody's."""

    def __init__(self, function: Callable[..., Any], *first: Any) -> None:
        self._function, self._first = function, first
        self.owner: object = getattr(function, "__self__", None)

    def __call__(self, *args: Any) -> Any:
        return self._function(*self._first, *args)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Hook:
    return Hook(_do_nothing)


def _do_nothing(*_: Any) -> None:
    return None
