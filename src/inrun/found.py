"""What a probe finds out about a model under one structure of inputs, and what is done with it to outputs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from inrun.errors import InrunError
from inrun.rows import Rows, Unknown
from inrun.timeline import Time
from inrun.units import Unit

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
