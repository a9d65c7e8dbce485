"""The outputs of every unit in a run of the model, and two runs compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.found import Found, expanded
from inrun.gradient import same
from inrun.operations import Operations
from inrun.rows import Rows
from inrun.trees import flatten, held, tensors, unflatten
from inrun.units import Unit


class Judge(Protocol):
    """What learns from a unit's outputs in two runs."""

    def see(self, unit: Unit, index: int, plain: Sequence[Any], again: Sequence[Any]) -> None:
        """The leaves of the unit's output in a call that both runs made."""

    def missed(self, unit: Unit) -> None:
        """It was called in one of the two runs only."""


class Seen:
    """What a unit put out."""

    def __init__(self, leaves: list[Any]) -> None:
        self.leaves = leaves
        self._versions = [x._version for x in tensors(leaves)]

    def unchanged(self) -> bool:
        """Whether nobody has written to it since."""
        return [x._version for x in tensors(self.leaves)] == self._versions


@dataclass(eq=False)
class Recording:
    """The outputs of every unit in one forward; or, with another to compare them with, what that tells."""

    examples: int
    expand: Found | None
    comparison: "Comparison | None"
    operations: Operations
    seen: dict[tuple[Unit, int], Seen] = field(default_factory=dict)
    problems: dict[Unit, InrunError] = field(default_factory=dict)
    output: Any = None
    random_state: Tensor | None = None
    drew: bool = False  # random numbers that differ from example to example
    drawn_to: object = None  # where the generators were at the end
    moved: bool = False  # buffers, or tensors that are attributes

    @contextmanager
    def of(self, units: Sequence[Unit]) -> Iterator[None]:
        """Inside the block, hooks on the units hand over their outputs."""
        handles = []
        for unit in units:
            if not unit.closed_form:  # it is run again
                guard = _Unchanging(unit, self.problems)
                handles.append(unit.module.register_forward_pre_hook(guard.before, with_kwargs=True))
                handles.append(unit.module.register_forward_hook(guard.after, with_kwargs=True))
            handles.append(unit.module.register_forward_hook(partial(self._see, unit)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, unit: Unit, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not unit.stands():
            return None
        index = sum(1 for other, _ in self.seen if other is unit)
        output_leaves, spec = flatten(output)
        leaves = list(output_leaves)
        now = Seen([x.detach() if isinstance(x, Tensor) else x for x in leaves])
        if not tensors(leaves) and held(leaves):
            self.problems.setdefault(unit, _hidden(unit, leaves))
        given = [k for k, x in enumerate(leaves) if isinstance(x, nn.Parameter)]  # as it is: to be used elsewhere
        if given:
            with self.operations.paused():
                leaves = [x.view_as(x) if k in given else x for k, x in enumerate(leaves)]
            for k in given:
                self.operations.used(output_leaves[k], module)
        self.seen[unit, index] = now if self.comparison is None else Seen([])  # one forward's are enough
        if self.comparison is not None:
            with self.operations.paused():
                self.comparison.see(unit, index, now.leaves)
        if self.expand is None:
            return unflatten(leaves, spec) if given else None
        rows = self.expand.rows.get((unit, index), [None] * len(leaves))
        with self.operations.paused():
            leaves = [
                expanded(x, r, self.examples, unit)[0] if isinstance(x, Tensor) and isinstance(r, Rows) else x
                for x, r in zip(leaves, rows, strict=True)
            ]
        return unflatten(leaves, spec)

    def same_as(self, other: "Recording") -> bool:
        """Outputs and use of random numbers are the same bit for bit, and every operation's shape is the same."""
        if self.random_state is None or other.random_state is None:
            return False
        mine, its = tensors(self.output), tensors(other.output)
        return (
            torch.equal(self.random_state, other.random_state)
            and self.operations.seen == other.operations.seen
            and len(mine) == len(its)
            and same(list(zip(mine, its, strict=True)))
        )


def _hidden(unit: Unit, leaves: Sequence[Any]) -> InrunError:
    kinds = ", ".join(dict.fromkeys(type(x).__name__ for x in leaves))
    return InrunError(
        f"{unit.name}: it puts out an object in which its tensors cannot be seen ({kinds}). Have it return a tensor, a "
        "tuple, a dict or a dataclass, or freeze the module (requires_grad_(False))."
    )


class _Unchanging:
    """Hooks that see whether a unit's call changes an object that it is given, so that it cannot be run again on it."""

    def __init__(self, unit: Unit, problems: dict[Unit, InrunError]) -> None:
        self._unit, self._problems = unit, problems
        self._held: list[list[tuple[int, int]]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._held.append(held((args, kwargs)))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._held.pop() != held((args, kwargs)):
            self._problems[self._unit] = InrunError(
                f"{self._unit.name}: it must be run again to value its parameters, but its call changes what it is "
                "given: a tensor in place, or an object (a cache of keys and values: use_cache=False turns it off). Or "
                "freeze the module (requires_grad_(False))."
            )


class Comparison:
    """What the outputs of every unit, of two runs of the model, tell a judge.

    What the second is compared with is dropped on the way, so that one forward's outputs are held and not two.
    """

    def __init__(self, plain: dict[tuple[Unit, int], Seen], judge: Judge) -> None:
        self._plain, self._judge = plain, judge
        self._later: list[tuple[Unit, int, Seen, list[Any]]] = []  # what the model worked on in place
        self.written: list[tuple[Unit, int]] = []

    def see(self, unit: Unit, index: int, again: list[Any]) -> None:
        """A unit's output of the second forward."""
        plain = self._plain.pop((unit, index), None)
        if plain is None:
            self._judge.missed(unit)
        elif plain.unchanged():
            self._judge.see(unit, index, plain.leaves, again)
        else:
            self._later.append((unit, index, plain, again))

    def finish(self) -> None:
        """The second run is over."""
        self.written = [(unit, index) for unit, index, *_ in self._later]
        for unit, index, plain, again in self._later:
            self._judge.see(unit, index, plain.leaves, again)
        for unit, _ in self._plain:
            self._judge.missed(unit)
