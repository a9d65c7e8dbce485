"""The tensors in what modules are given and put out: tuples, lists, dicts, and dataclasses inside of them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Spec:
    """What the leaves were in; of every leaf of `outer` that is a dataclass, itself and what it holds."""

    outer: TreeSpec
    inner: list[tuple[Any, "Spec"] | None]

    @property
    def leaves(self) -> int:
        return sum(1 if of is None else of[1].leaves for of in self.inner)

    def __str__(self) -> str:
        return str((str(self.outer), [of and (type(of[0]).__qualname__, str(of[1])) for of in self.inner]))


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """The leaves, and what `unflatten` needs to make the same of others."""
    found, outer = tree_flatten(tree)
    leaves: list[Any] = []
    inner: list[tuple[Any, Spec] | None] = []
    for leaf in found:
        if is_dataclass(leaf) and not isinstance(leaf, type):
            held, spec = flatten({f.name: getattr(leaf, f.name) for f in fields(leaf)})
            leaves += held
            inner.append((leaf, spec))
        else:
            leaves.append(leaf)
            inner.append(None)
    return leaves, Spec(outer, inner)


def unflatten(leaves: list[Any], spec: Spec) -> Any:
    """What has these leaves; dataclasses are copies of those that there were."""
    outer, begin = [], 0
    for of in spec.inner:
        if of is None:
            outer.append(leaves[begin])
            begin += 1
            continue
        original, held = of
        made = copy.copy(original)
        for name, x in unflatten(leaves[begin : begin + held.leaves], held).items():
            object.__setattr__(made, name, x)  # it may be frozen
        outer.append(made)
        begin += held.leaves
    return tree_unflatten(outer, spec.outer)


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The tree with the function's results for its tensors."""
    leaves, spec = flatten(tree)
    return unflatten([function(x) if isinstance(x, Tensor) else x for x in leaves], spec)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def held(tree: Any) -> list[tuple[int, int]]:
    """The tensors in a tree, and those that objects in it hold, and their versions."""
    found: list[tuple[int, int]] = []

    def look(x: Any, depth: int) -> None:
        if isinstance(x, Tensor):
            found.append((id(x), 0 if x.is_inference() else x._version))
        elif depth and isinstance(x, list | tuple | dict):
            for part in x.values() if isinstance(x, dict) else x:
                look(part, depth - 1)
        elif depth and hasattr(x, "__dict__") and not isinstance(x, type | nn.Module):
            look(vars(x), depth - 1)

    for leaf in tree_flatten(tree)[0]:
        look(leaf, 8)
    return found
