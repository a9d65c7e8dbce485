"""Whose rows are whose: found out by running the model, never guessed from a coincidence of sizes.

The model is run once more, in eval mode and without gradients, on the same batch in another order with one example
repeated. The dimension of a unit's output that grew by that one example is the example dimension, and the values say
in which order the rows stand. An output that did not change belongs to no example in particular (a position embedding
computed once): it is *batchless*, and is expanded so that its gradient arrives per example.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from inrun.errors import InrunError


@dataclass(frozen=True)
class Rows:
    """Where the examples stand in one tensor.

    The tensor has `ndim` dimensions. `dim` is the one that holds the examples, None for a batchless tensor. Where they
    are `merged` with another dimension, each example has several entries there: together (`blocks`), or one in every
    `examples`. `led`: a batchless tensor with a leading dimension of one, which the examples can take.
    """

    ndim: int
    dim: int | None
    merged: bool = False
    blocks: bool = True
    led: bool = False

    def fits(self, x: Tensor, examples: int) -> bool:
        """Whether the tensor can hold this many examples so."""
        if x.ndim != self.ndim:
            return False
        if self.dim is None:
            return not self.led or x.shape[0] == 1
        entries = x.shape[self.dim]
        return entries % examples == 0 if self.merged else entries == examples

    def split(self, x: Tensor, examples: int) -> Tensor:
        """The tensor as [examples, entries of each that are merged with them, *other dimensions]."""
        if self.dim is None:
            raise AssertionError("a batchless tensor has no rows")
        x = x.movedim(self.dim, 0)
        entries = x.shape[0] // examples
        if self.blocks:
            return x.reshape(examples, entries, *x.shape[1:])
        return x.reshape(entries, examples, *x.shape[1:]).transpose(0, 1)

    def per_example(self, x: Tensor, examples: int) -> Tensor:
        """The tensor as [examples, everything else]."""
        return self.split(x, examples).reshape(examples, -1)

    def by_features(self, x: Tensor, examples: int, features: int = 1) -> Tensor:
        """The tensor as [examples, rows, features], whose last dimensions, so many of them, are the features'."""
        shape = x.shape[x.ndim - features :]
        return self.per_example(x, examples).view(examples, -1, *shape)

    def reordered(self, x: Tensor, order: Tensor, examples: int) -> Tensor:
        """The tensor as it would be for the examples `order` (a list of indices that may repeat)."""
        if self.dim is None:
            return x
        entries = torch.arange(x.shape[self.dim], device=x.device)
        entries = entries.reshape(examples, -1) if self.blocks else entries.reshape(-1, examples).T
        picked = entries[order.to(x.device)]
        return x.index_select(self.dim, (picked if self.blocks else picked.T).reshape(-1))


@dataclass(frozen=True)
class Unknown:
    """Of a tensor that the examples cannot be found in: an error if a gradient comes back to it."""

    why: str


def shuffled(examples: int) -> Tensor:
    """The order of the second run: all examples, as much out of place as can be, and the first once more."""
    return torch.cat([torch.arange(examples).roll(1), torch.zeros(1, dtype=torch.long)])


def without_last(examples: int) -> Tensor:
    """As many examples, none in its place but the first, which is there twice for the last."""
    order = torch.arange(examples).roll(1)
    order[0] = 0
    return order


def every_other(examples: int) -> tuple[Tensor, Tensor]:
    """Every other example in its place, the first once more in all others; and the places that are kept."""
    order = torch.arange(examples)
    order[1::2] = 0
    return order, torch.arange(0, examples, 2)


def same(x: Tensor, y: Tensor) -> bool:
    """Equal to what another place in the batch may change by rounding."""
    if x.shape != y.shape:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(x.dtype, 5e-2)
    x, y = x.double(), y.double()
    finite = x.isfinite() & y.isfinite()
    scale = torch.where(finite, x, 0).abs().max() if x.numel() else 0.0
    return bool(torch.isclose(x, y, rtol=0.0, atol=float(scale) * tolerance, equal_nan=True).all())


def find_rows(
    plain: Tensor, again: Tensor, order: Tensor, examples: int, where: str, merges: Collection[int] | None = None
) -> Rows:
    """The rows of a unit's output, from its values on the batch (`plain`) and on the examples `order` (`again`).

    `merges` are the numbers of entries per example that can be another dimension of the inputs: any other may be a
    number of unmasked tokens, which another batch will have in another distribution.

    Raises InrunError where no dimension, or more than one, can be the examples'.
    """
    if plain.ndim == again.ndim:
        grown = [d for d in range(plain.ndim) if plain.shape[d] != again.shape[d]]
        if not grown and same(plain, again):
            return Rows(plain.ndim, None, led=plain.ndim > 0 and plain.shape[0] == 1)
        fits = len(grown) == 1 and plain.shape[grown[0]] * len(order) == again.shape[grown[0]] * examples
        if fits:
            if plain.shape[grown[0]] == examples:
                candidates = [Rows(plain.ndim, grown[0])]
            elif merges is None or plain.shape[grown[0]] // examples in merges:
                candidates = [Rows(plain.ndim, grown[0], merged=True, blocks=blocks) for blocks in (True, False)]
            else:
                candidates = []
            found = [rows for rows in candidates if same(rows.reordered(plain, order, examples), again)]
            if len(found) == 1:
                return found[0]
            if found:
                raise InrunError(
                    f"{where}: the output of shape {tuple(plain.shape)} merges the {examples} examples with another "
                    "dimension, and its values do not tell in which order (they are constant). Attach after the first "
                    "update, or initialise the module with other than constants."
                )
    raise InrunError(
        f"{where}: cannot tell which rows of its output belong to which example: shape {tuple(plain.shape)} for "
        f"{examples} examples, {tuple(again.shape)} for the same in another order and one more. The examples of a "
        "batch are mixed, reordered or packed inside the model, or its output does not follow from its input alone. "
        "Freeze this module (requires_grad_(False)), or compute the examples apart from one another."
    )
