"""Whose rows are whose: found out by running the model, never guessed from a coincidence of sizes.

The model is run once more, in eval mode and without gradients, on the same batch in another order with one example
repeated. The dimension of a unit's output that grew by that one example is the example dimension, and the values say
in which order the rows stand. An output that did not change belongs to no example in particular (a position embedding
computed once): it is *batchless*, and is expanded so that its gradient arrives per example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from inrun.errors import InrunError


@dataclass(frozen=True)
class Rows:
    """Where the examples stand in one tensor.

    `dim` is the dimension that holds them, None for a batchless tensor. Where they are `merged` with another dimension,
    each example has several entries there: together (`blocks`), or one in every `examples`.
    """

    dim: int | None
    merged: bool = False
    blocks: bool = True

    def fits(self, x: Tensor, examples: int) -> bool:
        """Whether the tensor can hold this many examples so."""
        if self.dim is None or self.dim >= x.ndim:
            return self.dim is None
        entries = x.shape[self.dim]
        return entries % examples == 0 if self.merged else entries == examples

    def per_example(self, x: Tensor, examples: int) -> Tensor:
        """The tensor as [examples, everything else]."""
        if self.dim is None:
            raise AssertionError("a batchless tensor has no rows")
        x = x.movedim(self.dim, 0)
        if self.blocks:
            return x.reshape(examples, -1)
        return x.reshape(x.shape[0] // examples, examples, -1).transpose(0, 1).reshape(examples, -1)

    def reordered(self, x: Tensor, order: Tensor, examples: int) -> Tensor:
        """The tensor as it would be for the examples `order` (a list of indices that may repeat)."""
        if self.dim is None:
            return x
        entries = torch.arange(x.shape[self.dim], device=x.device)
        entries = entries.reshape(examples, -1) if self.blocks else entries.reshape(-1, examples).T
        picked = entries[order.to(x.device)]
        return x.index_select(self.dim, (picked if self.blocks else picked.T).reshape(-1))


def shuffled(examples: int) -> Tensor:
    """The order of the second run: all examples, as much out of place as can be, and the first once more."""
    return torch.cat([torch.arange(examples).roll(1), torch.zeros(1, dtype=torch.long)])


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


def find_rows(plain: Tensor, again: Tensor, order: Tensor, examples: int, where: str) -> Rows:
    """The rows of a unit's output, from its values on the batch (`plain`) and on the examples `order` (`again`).

    Raises InrunError where no dimension, or more than one, can be the examples'.
    """
    if plain.ndim == again.ndim:
        grown = [d for d in range(plain.ndim) if plain.shape[d] != again.shape[d]]
        if not grown and same(plain, again):
            return Rows(None)
        fits = len(grown) == 1 and plain.shape[grown[0]] * len(order) == again.shape[grown[0]] * examples
        if fits:
            if plain.shape[grown[0]] == examples:
                candidates = [Rows(grown[0])]
            else:
                candidates = [Rows(grown[0], merged=True), Rows(grown[0], merged=True, blocks=False)]
            found = [rows for rows in candidates if same(rows.reordered(plain, order, examples), again)]
            if len(found) == 1:
                return found[0]
            if found:
                raise InrunError(
                    f"{where}: the output of shape {tuple(plain.shape)} merges the {examples} examples with "
                    "another dimension, and its values do not tell "
                    "in which order (they are constant). Attach after the first update, or initialise the "
                    "module with other than constants."
                )
    raise InrunError(
        f"{where}: cannot tell which rows of its output belong to which example: shape {tuple(plain.shape)} "
        f"for {examples} examples, {tuple(again.shape)} for the same in another order "
        "and one more. The examples of a batch are mixed or reordered inside the model, or its output does "
        "not follow from its input alone. "
        "Freeze this module (requires_grad_(False)), or compute it one example apart from another."
    )


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
        return leaf if leaf is None or isinstance(leaf, bool | str) else type(leaf)

    def carrying(self, examples: int) -> list[int]:
        """The places of the tensors that have this many entries in the batch dimension."""
        d = self.batch_dim
        return [k for k, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.ndim > d and x.shape[d] == examples]

    def shapes(self) -> str:
        return ", ".join(str(tuple(x.shape)) for x in self.leaves if isinstance(x, Tensor)) or "no tensors"

    def reordered(self, carrying: Sequence[int], order: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the examples `order`."""
        leaves = list(self.leaves)
        for k in carrying:
            leaves[k] = leaves[k].index_select(self.batch_dim, order.to(leaves[k].device))
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs
