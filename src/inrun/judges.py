"""What two runs of a model on other examples tell: whose rows are whose, and whether examples are mixed."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.found import Found, Leaves
from inrun.rows import Rows, Unknown, find_rows
from inrun.rows import same as same_rows
from inrun.trees import tensors
from inrun.units import Unit


class FindRows:
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


class FindMixed:
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


def example_dims(plain: Any, again: Any, order: Tensor) -> tuple[int | None, ...]:
    """Of the leaves of a model's output, the one dimension that grew from one entry per example to one for each in
    `order`.
    """
    found: list[int | None] = []
    for x, y in zip(tensors(plain), tensors(again), strict=False):
        grown = [d for d in range(x.ndim) if x.ndim == y.ndim and x.shape[d] != y.shape[d]]
        told = len(grown) == 1 and (x.shape[grown[0]], y.shape[grown[0]]) == (len(order) - 1, len(order))
        found.append(grown[0] if told else None)
    return tuple(found)


def mixed_output(plain: Any, again: Any, dims: Sequence[int | None], order: Tensor, only: Tensor | None = None) -> str:
    """Says so if some of a model's output for one example (of those in the places `only`) depends on the others."""
    for x, y, d in zip(tensors(plain), tensors(again), dims, strict=False):
        if d is not None and x.ndim == y.ndim:
            x = x.index_select(d, order.to(x.device))
            if only is not None and x.shape == y.shape:
                x, y = (z.index_select(d, only.to(z.device)) for z in (x, y))
            if not same_rows(x, y):
                return "the model's output"
    return ""
