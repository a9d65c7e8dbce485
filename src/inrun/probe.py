"""Runs the model to find out whose rows are whose (inrun.rows) and where parameters are used (inrun.units).

The model is left as it was.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.gradient import same
from inrun.inputs import Inputs
from inrun.operations import Operations, Reads, drawn, held
from inrun.rows import Rows, Unknown, every_other, find_rows, shuffled, without_last
from inrun.rows import same as same_rows
from inrun.target import Evaluation
from inrun.timeline import Time
from inrun.trees import flatten, tensors, unflatten
from inrun.units import Unit, Units

Leaves = tuple[Rows | Unknown | None, ...]  # of an output; None: not a tensor


@dataclass(frozen=True)
class Found:
    """The rows of every call's outputs under one structure of inputs, and the inputs that carry the examples."""

    rows: Mapping[tuple[Unit, int], Leaves]
    carrying: tuple[int, ...]
    counted: bool  # an operation chose entries by their values, so that the examples may have different numbers of them
    outputs: tuple[int | None, ...] = ()  # of the model's output, leaf by leaf the dimension that holds the examples
    mixed: str = ""  # where the examples of a batch were first seen to be mixed
    written: frozenset[tuple[Unit, int]] = frozenset()  # calls whose outputs the model works on in place
    alone: bool = False  # on one example, which does not tell what is mixed
    moving: bool = False  # the forward in train mode changes what the model holds besides its parameters
    times: Mapping[tuple[Unit, int], tuple[Time | None, ...]] | None = None  # where its tokens stand in every output

    @property
    def merged(self) -> bool:
        """Whether any output merges the examples with another dimension."""
        return any(isinstance(r, Rows) and r.merged for of in self.rows.values() for r in of)

    def batchless(self) -> list[Unit]:
        """The units of which a call's output has no example dimension."""
        return list(dict.fromkeys(u for (u, _), of in self.rows.items() if any(map(_is_batchless, of))))

    def only(self, units: Collection[Unit]) -> "Found":
        """The same of these units alone."""
        return replace(self, rows={key: of for key, of in self.rows.items() if key[0] in units})

    def unled(self) -> "Found":
        """The same, with no leading dimension of one taken for the examples'."""
        rows = {
            key: tuple(replace(r, led=False) if isinstance(r, Rows) else r for r in of) for key, of in self.rows.items()
        }
        return replace(self, rows=rows)


def _is_batchless(rows: Rows | Unknown | None) -> bool:
    return isinstance(rows, Rows) and rows.dim is None


class Probe:
    """Runs a model to find the rows of every unit's outputs, and which parameters are used where."""

    def __init__(self, model: nn.Module, units: Units) -> None:
        self._model, self._units = model, units
        self._evaluation, self._as_it_is = Evaluation(model), Evaluation(model, evaluate=False)

    def find(self, inputs: Inputs, examples: int) -> Found:
        """The rows under this structure of inputs, with the units that the model's parameters have from now on.

        Raises InrunError where rows cannot be told, of any module that could be the unit of a parameter.
        """
        carrying, order = inputs.carrying(examples), shuffled(examples)
        reads: Reads = defaultdict(dict)  # of all rounds: they do not hang on what the units are
        while True:
            found, problems = self._rows(inputs, carrying, order, None if self._model.training else reads)
            if not problems:
                found, problems = self._expandable(inputs, order, found)
            if not problems and self._model.training:
                found = self._trained(inputs, examples, found, reads)
            if not self._units.settle(reads, problems):
                return found

    def _rows(
        self, inputs: Inputs, carrying: list[int], order: Tensor, reads: Reads | None
    ) -> tuple[Found, dict[Unit, InrunError]]:
        """The rows of every output, and of which units they cannot be told."""
        examples, counted = len(order) - 1, False
        while True:
            plain = self._run(inputs, carrying, torch.arange(examples), still=True)
            counted |= plain.operations.counted
            judge = _Rows(order, inputs.merges(carrying) if counted else None, self._model, plain.problems)
            comparison = _Comparison(plain.seen, judge)
            again = self._run(inputs, carrying, order, reads, still=True, comparison=comparison)
            if counted or not again.operations.counted:
                break
            counted = True
        comparison.finish()
        outputs = _example_dims(plain.output, again.output, order)
        mixed = _mixed_output(plain.output, again.output, outputs, order)
        written = frozenset(comparison.written)
        found = Found(judge.rows, tuple(carrying), counted, outputs, mixed, written=written, alone=examples == 1)
        return found, judge.problems

    def outputs(self, inputs: Inputs, carrying: Sequence[int], examples: int) -> dict[tuple[Unit, int], list[Any]]:
        """What every unit puts out on these inputs in eval mode, by call."""
        seen = self._run(inputs, list(carrying), torch.arange(examples)).seen
        return {call: of.leaves for call, of in seen.items()}

    def _expandable(self, inputs: Inputs, order: Tensor, found: Found) -> tuple[Found, dict[Unit, InrunError]]:
        """The rows with which batchless outputs can be expanded and the model still computes the same; and the units of
        which they cannot.

        In train mode, with dropout: the same outputs bit for bit, by operations of the same shapes. A leading dimension
        of one may be the examples' to take, as in [1, T, d], or another that happens to be one: what holds is tried.
        """
        batchless = found.batchless()
        if not batchless:
            return found, {}
        plain = self._run(inputs, list(found.carrying), order, train=True)

        def expands(kind: Found) -> str:
            try:
                same = plain.same_as(self._run(inputs, list(found.carrying), order, train=True, expand=kind))
                return "" if same else "changes what the model computes"
            except InrunError as error:
                return f"fails ({error.__cause__ or error})"

        kinds = [found] if found.unled() == found else [found, found.unled()]
        for kind in kinds:
            if not expands(kind):
                return kind, {}
        problems: dict[Unit, InrunError] = {}
        alike: dict[str, list[Unit]] = {}  # but for the numbers of layers: one run for all of them
        for unit in batchless:
            alike.setdefault(re.sub(r"\d+", "#", unit.name), []).append(unit)
        for some in alike.values():
            problem = min(expands(kind.only(some)) for kind in kinds)
            if problem:
                problems |= {
                    unit: InrunError(
                        f"{unit.name}: the output has no example dimension (one for all examples), and giving it one "
                        f"{problem}. Add it to the examples' tensor as it is ([T, d] or [1, T, d]), and apply dropout "
                        "or reshapes after that; or freeze the module (requires_grad_(False))."
                    )
                    for unit in some
                }
        together = InrunError(
            f"{', '.join(unit.name for unit in batchless)}: their outputs have no example dimension (one for all "
            "examples), and giving all of them one changes what the model computes. Freeze one of these modules "
            "(requires_grad_(False))."
        )
        return found, problems or dict.fromkeys(batchless, together)

    def _trained(self, inputs: Inputs, examples: int, found: Found, reads: Reads) -> Found:
        """The same, with what is mixed in train mode: there random numbers are replaced by their mean.

        The uses of parameters are those of the second run: the first may be what changes weights between the modes.
        """
        carrying, order = list(found.carrying), without_last(examples)
        plain = self._run(inputs, carrying, torch.arange(examples), train=True, still=True)
        judge = _Mixed(order, found)
        comparison = _Comparison(plain.seen, judge)
        again = self._run(inputs, carrying, order, reads, train=True, still=True, comparison=comparison)
        comparison.finish()
        found = replace(found, moving=plain.moved)
        mixed = judge.mixed or _mixed_output(plain.output, again.output, found.outputs, order)
        if mixed and (plain.drew or again.drew):
            mixed = self._mixed_in_place(inputs, examples, found)
        return replace(found, mixed=found.mixed or mixed)

    def _mixed_in_place(self, inputs: Inputs, examples: int, found: Found) -> str:
        """Where examples are mixed in a forward that draws numbers: those that stay in their places, with the numbers
        that they had, come out otherwise if others are changed.

        Where other examples make it draw another number of them, it cannot be told.
        """
        order, staying = every_other(examples)
        plain = self._run(inputs, list(found.carrying), torch.arange(examples), train=True, still=True)
        judge = _Mixed(order, found, staying)
        comparison = _Comparison(plain.seen, judge)
        again = self._run(inputs, list(found.carrying), order, train=True, still=True, comparison=comparison)
        comparison.finish()
        if again.drawn_to != plain.drawn_to:
            return ""
        return judge.mixed or _mixed_output(plain.output, again.output, found.outputs, order, staying)

    def _run(
        self,
        inputs: Inputs,
        carrying: list[int],
        order: Tensor,
        reads: Reads | None = None,
        *,
        train: bool = False,
        still: bool = False,
        expand: Found | None = None,
        comparison: "_Comparison | None" = None,
    ) -> "_Recording":
        """One forward on the examples `order`, without gradients; in eval mode unless `train`."""
        recording = _Recording(len(order), expand, comparison, Operations(reads, still))
        before = drawn()
        try:
            args, kwargs = inputs.reordered(carrying, order)
            evaluation = (self._as_it_is if train else self._evaluation)()
            told = warnings.catch_warnings()  # what a forward warns of without gradients is not the user's doing
            with evaluation as state, torch.no_grad(), recording.of(self._units.all), told:
                warnings.simplefilter("ignore")
                with recording.operations.keeping(self._model.parameters()), recording.operations:
                    recording.output = self._model(*args, **kwargs)
                recording.moved = state.moved()
                recording.random_state = torch.get_rng_state()
                recording.drawn_to = (recording.random_state.tolist(), drawn(), state.drawn())
                recording.drew |= recording.operations.drew or drawn() != before or state.drew()
        except InrunError:
            raise
        except Exception as error:
            raise InrunError(
                f"the model could not be run on {len(order)} examples to find out whose rows are whose "
                f"({type(error).__name__}: {error}). Of its inputs of shape {inputs.shapes()}, those with one entry "
                f"per example in dimension {inputs.batch_dim} were taken to hold the examples. If one of them does "
                "not, begin with a batch of another size."
            ) from error
        self._check_written(recording.operations.written, train)
        return recording

    def _check_written(self, written: Sequence[nn.Parameter], train: bool) -> None:
        """Raise InrunError if the forward would write to parameters when it is run for the target, or run again."""
        again = [unit for unit in self._units.all if not unit.closed_form]
        for name, p in self._model.named_parameters():
            if any(p is x for x in written):
                inside = [unit.name for unit in again if any(p is x for x in unit.module.parameters())]
                if inside or (not train and not self._units.trains(p)):
                    raise InrunError(
                        f"{name}: the model's forward writes to this parameter, and must be run more often "
                        f"({inside[0] + ' is run again' if inside else 'for the target'}). Do it outside of the "
                        "forward, after optimizer.step(), or only in training mode."
                    )


class _Seen:
    """What a unit put out."""

    def __init__(self, leaves: list[Any]) -> None:
        self.leaves = leaves
        self._versions = [x._version for x in tensors(leaves)]

    def unchanged(self) -> bool:
        """Whether nobody has written to it since."""
        return [x._version for x in tensors(self.leaves)] == self._versions


@dataclass(eq=False)
class _Recording:
    """The outputs of every unit in one forward; or, with another to compare them with, what that tells."""

    examples: int
    expand: Found | None
    comparison: "_Comparison | None"
    operations: Operations
    seen: dict[tuple[Unit, int], _Seen] = field(default_factory=dict)
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
        now = _Seen([x.detach() if isinstance(x, Tensor) else x for x in leaves])
        if not tensors(leaves) and held(leaves):
            self.problems.setdefault(unit, _hidden(unit, leaves))
        given = [k for k, x in enumerate(leaves) if isinstance(x, nn.Parameter)]  # as it is: to be used elsewhere
        if given:
            with self.operations.paused():
                leaves = [x.view_as(x) if k in given else x for k, x in enumerate(leaves)]
            for k in given:
                self.operations.used(output_leaves[k], module)
        self.seen[unit, index] = now if self.comparison is None else _Seen([])  # one forward's are enough
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

    def same_as(self, other: "_Recording") -> bool:
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


class _Comparison:
    """What the outputs of every unit, of two runs of the model, tell a judge.

    What the second is compared with is dropped on the way, so that one forward's outputs are held and not two.
    """

    def __init__(self, plain: dict[tuple[Unit, int], _Seen], judge: "_Rows | _Mixed") -> None:
        self._plain, self._judge = plain, judge
        self._later: list[tuple[Unit, int, _Seen, list[Any]]] = []  # what the model worked on in place
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


class _Rows:
    """Finds the rows of every output, or the reason why they cannot be told."""

    def __init__(
        self, order: Tensor, merges: Collection[int] | None, model: nn.Module, problems: dict[Unit, InrunError]
    ) -> None:
        self._order, self._examples, self._merges, self._model = order, len(order) - 1, merges, model
        self.rows: dict[tuple[Unit, int], Leaves] = {}
        self.problems = problems

    def missed(self, unit: Unit) -> None:
        """It was called in one of the two runs only."""
        self.problems.setdefault(
            unit,
            InrunError(
                f"{unit.name}: the model calls it another number of times for {self._examples} and for "
                f"{self._examples + 1} examples, which cannot be attributed."
            ),
        )

    def see(self, unit: Unit, index: int, plain: Sequence[Any], again: Sequence[Any]) -> None:
        if len(plain) != len(again):
            self.missed(unit)
            return
        self.rows[unit, index] = tuple(self._of(unit, x, y) for x, y in zip(plain, again, strict=True))

    def _of(self, unit: Unit, x: Any, y: Any) -> Rows | Unknown | None:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return None
        try:
            rows = find_rows(x, y, self._order, self._examples, unit.name, self._merges)
        except InrunError as problem:
            if unit.module is self._model:  # there is none around it; and what it puts out need not be used
                return Unknown(str(problem))
            self.problems.setdefault(unit, problem)
            return None
        if rows.dim is None and unit.module is self._model:
            return Unknown(
                f"{unit.name}: its output of shape {tuple(x.shape)} has no example dimension, and parameters are "
                f"used in it that are valued by what the whole model puts out: {', '.join(unit.parameters)}. Have "
                "the model return what depends on one example each (logits instead of their mean loss), or freeze "
                "these parameters (requires_grad_(False))."
            )
        return rows


class _Mixed:
    """Finds the first unit whose output for one example depends on the others."""

    def __init__(self, order: Tensor, found: Found, only: Tensor | None = None) -> None:
        """`only`: of the examples in these places."""
        self._order, self._found, self._only = order, found, only
        self.mixed = ""

    def missed(self, unit: Unit) -> None:
        """That it was called in one of the two runs only says nothing."""

    def see(self, unit: Unit, index: int, plain: Sequence[Any], again: Sequence[Any]) -> None:
        examples = len(self._order)
        for x, y, r in zip(plain, again, self._found.rows.get((unit, index), ()), strict=False):
            if self.mixed or not isinstance(r, Rows) or not r.fits(x, examples):
                continue
            if r.dim is None and self._only is not None:
                continue  # what is random may differ
            x = r.reordered(x, self._order, examples)
            if self._only is not None and y.shape == x.shape:
                x, y = (r.reordered(z, self._only, examples) for z in (x, y))
            if not same_rows(x, y):
                self.mixed = unit.name


def _example_dims(plain: Any, again: Any, order: Tensor) -> tuple[int | None, ...]:
    """Of the leaves of a model's output, the one dimension that grew from one entry per example to one for each in
    `order`.
    """
    found: list[int | None] = []
    for x, y in zip(tensors(plain), tensors(again), strict=False):
        grown = [d for d in range(x.ndim) if x.ndim == y.ndim and x.shape[d] != y.shape[d]]
        told = len(grown) == 1 and (x.shape[grown[0]], y.shape[grown[0]]) == (len(order) - 1, len(order))
        found.append(grown[0] if told else None)
    return tuple(found)


def _mixed_output(plain: Any, again: Any, dims: Sequence[int | None], order: Tensor, only: Tensor | None = None) -> str:
    """Says so if some of a model's output for one example (of those in the places `only`) depends on the others."""
    for x, y, d in zip(tensors(plain), tensors(again), dims, strict=False):
        if d is not None and x.ndim == y.ndim:
            x = x.index_select(d, order.to(x.device))
            if only is not None and x.shape == y.shape:
                x, y = (z.index_select(d, only.to(z.device)) for z in (x, y))
            if not same_rows(x, y):
                return "the model's output"
    return ""


def expanded(leaf: Tensor, rows: Rows | None, examples: int, unit: Unit) -> tuple[Tensor, Rows]:
    """The output with an example dimension, and its rows.

    A batchless output becomes a view that repeats it for every example. Raises InrunError if it is not as `rows` say.
    """
    batchless = rows is not None and rows.dim is None and leaf.ndim == rows.ndim + (not rows.led)
    if batchless and leaf.shape[0] == examples and leaf.stride(0) == 0:  # done by another attributor on the model
        return leaf, Rows(leaf.ndim, 0)
    if rows is None or not rows.fits(leaf, examples):
        raise InrunError(
            f"{unit.name}: its output of shape {tuple(leaf.shape)} for {examples} examples is laid out otherwise than "
            "when the model was run to find out whose rows are whose. A forward whose layout changes cannot be "
            "attributed."
        )
    if rows.dim is not None:
        return leaf, rows
    shape = leaf.shape[1:] if rows.led else leaf.shape
    return leaf.expand(examples, *shape), Rows(len(shape) + 1, 0)
