"""Runs the model to find out whose rows are whose (inrun.rows), and leaves it as it was."""

import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from inrun.errors import InrunError
from inrun.gradient import same
from inrun.rows import Rows, find_rows, shuffled
from inrun.target import Evaluation
from inrun.timeline import Time


@dataclass(frozen=True, eq=False)
class Unit:
    """A module and the trained parameters it owns directly, by their names in the module."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class Found:
    """The rows of every call's outputs under one structure of inputs, and the inputs that carry the examples."""

    rows: Mapping[tuple[Unit, int], tuple[Rows | None, ...]]
    carrying: tuple[int, ...]
    counted: bool  # an operation chose entries by their values, so that the examples may have different numbers of them
    times: Mapping[tuple[Unit, int], tuple[Time | None, ...]] | None = None  # where its tokens stand in every output

    @property
    def merged(self) -> bool:
        """Whether any output merges the examples with another dimension."""
        return any(r is not None and r.merged for of in self.rows.values() for r in of)

    def unled(self) -> "Found":
        """The same, with no leading dimension of one taken for the examples'."""
        rows = {key: tuple(r and replace(r, led=False) for r in of) for key, of in self.rows.items()}
        return replace(self, rows=rows)


class Inputs:
    """The arguments of the model's call, and which of their tensors carry the examples."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], batch_dim: int) -> None:
        self.leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
        self.batch_dim = batch_dim
        # the structure under which what was found once stays true: everything but the sizes and the values
        self.signature = (str(self._spec), *(self._sign(leaf) for leaf in self.leaves))

    @staticmethod
    def _sign(leaf: Any) -> object:
        if isinstance(leaf, Tensor):
            return leaf.ndim, leaf.dtype
        return (type(leaf), leaf) if isinstance(leaf, Hashable) else type(leaf)

    def exact(self) -> tuple[object, ...]:
        """The signature with the sizes and the single numbers, on which a merged layout may hang."""
        tensors = [x for x in self.leaves if isinstance(x, Tensor)]
        sizes = [
            x.item() if x.ndim == 0 else tuple(n for d, n in enumerate(x.shape) if d != self.batch_dim) for x in tensors
        ]
        return (*self.signature, *sizes)

    def carrying(self, examples: int) -> list[int]:
        """The places of the tensors that have this many entries in the batch dimension."""
        d = self.batch_dim
        return [k for k, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.ndim > d and x.shape[d] == examples]

    def merges(self, carrying: Sequence[int]) -> set[int]:
        """The products of other dimensions of these tensors: what a reshape can merge with the examples."""
        found = set()
        for k in carrying:
            rest = [size for d, size in enumerate(self.leaves[k].shape) if d != self.batch_dim]
            found |= {math.prod(some) for n in range(len(rest) + 1) for some in combinations(rest, n)}
        return found

    def shapes(self) -> str:
        return ", ".join(str(tuple(x.shape)) for x in self.leaves if isinstance(x, Tensor)) or "no tensors"

    def reordered(self, carrying: Sequence[int], order: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the examples `order`."""
        leaves = list(self.leaves)
        for k in carrying:
            leaves[k] = leaves[k].index_select(self.batch_dim, order.to(leaves[k].device))
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs


class Probe:
    """Finds the rows of every unit's outputs. Hooks on the units hand their outputs to `see` while it is
    `recording`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._evaluation, self._as_it_is = Evaluation(model), Evaluation(model, evaluate=False)
        self._recording: _Recording | None = None

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def see(self, unit: Unit, output: Any) -> Any:
        """A unit's output while the model is run; what it returns takes the output's place."""
        return None if self._recording is None else self._recording.see(unit, output)

    def find(self, inputs: Inputs, examples: int) -> Found:
        """The rows under this structure of inputs.

        Raises InrunError where they cannot be told, or where a batchless output cannot be given an example dimension.
        """
        carrying, order = inputs.carrying(examples), shuffled(examples)
        counted = False
        while True:
            plain = self._run(inputs, carrying, torch.arange(examples))
            counted |= plain.operations.counted
            comparison = _Comparison(plain.seen, order, examples, inputs.merges(carrying) if counted else None)
            again = self._run(inputs, carrying, order, comparison=comparison)
            if counted or not again.operations.counted:
                break
            counted = True
        return self._expandable(inputs, order, Found(comparison.finished(), tuple(carrying), counted))

    def outputs(self, inputs: Inputs, carrying: Sequence[int], examples: int) -> dict[tuple[Unit, int], list[Any]]:
        """What every unit puts out on these inputs in eval mode, by call."""
        seen = self._run(inputs, list(carrying), torch.arange(examples)).seen
        return {call: of.leaves for call, of in seen.items()}

    def _expandable(self, inputs: Inputs, order: Tensor, found: Found) -> Found:
        """The rows with which batchless outputs can be expanded and the model still computes the same.

        In train mode, with dropout: the same outputs bit for bit, by operations of the same shapes. A leading dimension
        of one may be the examples' to take, as in [1, T, d], or another that happens to be one: what holds is tried.
        """
        batchless = sorted(
            {u.name for (u, _), of in found.rows.items() if any(r is not None and r.dim is None for r in of)}
        )
        if not batchless:
            return found
        plain = self._run(inputs, list(found.carrying), order, train=True)
        problem = "changes what the model computes"
        for kind in (found, found.unled()):
            try:
                if plain.same_as(self._run(inputs, list(found.carrying), order, train=True, expand=kind)):
                    return kind
            except InrunError as error:
                problem = f"fails ({error.__cause__ or error})"
        raise InrunError(
            f"{', '.join(batchless)}: the output has no example dimension (one for all examples), and giving it one "
            f"{problem}. Add it to the examples' tensor as it is ([T, d] or [1, T, d]), and apply dropout or reshapes "
            "after that; or freeze the module (requires_grad_(False))."
        )

    def _run(
        self,
        inputs: Inputs,
        carrying: list[int],
        order: Tensor,
        *,
        train: bool = False,
        expand: Found | None = None,
        comparison: "_Comparison | None" = None,
    ) -> "_Recording":
        """One forward on the examples `order`, without gradients; in eval mode unless `train`."""
        recording = _Recording(len(order), expand, comparison)
        try:
            args, kwargs = inputs.reordered(carrying, order)
            with (self._as_it_is if train else self._evaluation)(), torch.no_grad():
                self._recording = recording
                with recording.operations:
                    recording.output = self._model(*args, **kwargs)
                recording.random_state = torch.get_rng_state()
        except InrunError:
            raise
        except Exception as error:
            raise InrunError(
                f"the model could not be run on {len(order)} examples to find out whose rows are whose "
                f"({type(error).__name__}: {error}). Of its inputs of shape {inputs.shapes()}, those with one entry "
                f"per example in dimension {inputs.batch_dim} were taken to hold the examples. If one of them does "
                "not, begin with a batch of another size."
            ) from error
        finally:
            self._recording = None
        return recording


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
    seen: dict[tuple[Unit, int], _Seen] = field(default_factory=dict)
    operations: "_Operations" = field(default_factory=lambda: _Operations())
    output: Any = None
    random_state: Tensor | None = None

    def see(self, unit: Unit, output: Any) -> Any:
        index = sum(1 for other, _ in self.seen if other is unit)
        leaves, spec = tree_flatten(output)
        now = _Seen([x.detach() if isinstance(x, Tensor) else x for x in leaves])
        self.seen[unit, index] = now if self.comparison is None else _Seen([])  # one forward's are enough
        if self.comparison is not None:
            with self.operations.paused():
                self.comparison.see(unit, index, now.leaves)
        if self.expand is None:
            return None
        rows = self.expand.rows.get((unit, index), ())
        with self.operations.paused():
            leaves = [
                expanded(x, r, self.examples, unit)[0] if isinstance(x, Tensor) else x
                for x, r in zip(leaves, rows, strict=True)
            ]
        return tree_unflatten(leaves, spec)

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


class _Comparison:
    """The rows of every unit's outputs, found while the model is run on the examples `order`.

    What it is compared with is dropped on the way, so that one forward's outputs are held and not two.
    """

    def __init__(
        self,
        plain: dict[tuple[Unit, int], _Seen],
        order: Tensor,
        examples: int,
        merges: Collection[int] | None,
    ) -> None:
        self._plain, self._order, self._examples, self._merges = plain, order, examples, merges
        self._rows: dict[tuple[Unit, int], tuple[Rows | None, ...]] = {}
        self._later: list[tuple[Unit, int, _Seen, list[Any]]] = []  # what the model worked on in place

    def see(self, unit: Unit, index: int, again: list[Any]) -> None:
        """A unit's output of the second forward. Raises InrunError where its rows cannot be told."""
        plain = self._plain.pop((unit, index), _Seen([]))
        if plain.unchanged():
            self._compare(unit, index, plain, again)
        else:
            self._later.append((unit, index, plain, again))

    def _compare(self, unit: Unit, index: int, plain: "_Seen", again: Sequence[Any]) -> None:
        if len(plain.leaves) != len(again):
            raise self._other_calls(unit)
        self._rows[unit, index] = tuple(
            find_rows(x, y, self._order, self._examples, unit.name, self._merges)
            if isinstance(x, Tensor) and isinstance(y, Tensor)
            else None
            for x, y in zip(plain.leaves, again, strict=True)
        )

    def _other_calls(self, unit: Unit) -> InrunError:
        return InrunError(
            f"{unit.name}: the model calls it another number of times for {self._examples} and for "
            f"{self._examples + 1} examples, which cannot be attributed."
        )

    def finished(self) -> dict[tuple[Unit, int], tuple[Rows | None, ...]]:
        """The rows, by unit and call. Raises InrunError if the first forward had other calls."""
        for unit, index, plain, again in self._later:
            self._compare(unit, index, plain, again)
        for unit, _ in self._plain:
            raise self._other_calls(unit)
        return self._rows


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The name and the shape of every operation inside the block, and whether one of them chose entries by value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, list[torch.Size]]] = []
        self.counted = False
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._paused:
            return output
        name = str(func)
        masked = "index" in name and any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args))
        self.counted |= masked or any(word in name for word in ("nonzero", "masked_select", "unique", "pack_padded"))
        self.seen.append((name, [x.shape for x in tensors(output)]))
        return output


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


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
