"""The arguments of a model's call, and which of their tensors carry the examples."""

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import Tensor

from inrun.trees import flatten, unflatten


class Inputs:
    """The arguments of the model's call, and which of their tensors carry the examples."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], batch_dim: int) -> None:
        self.leaves, self._spec = flatten((tuple(args), dict(kwargs)))
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
        args, kwargs = unflatten(leaves, self._spec)
        return args, kwargs
