"""The tensors in what modules are given and put out: tuples, lists, dicts, and dataclasses inside of them."""

import copy
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Spec = tuple[Any, list[tuple[int, Any, Any]]]


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """The leaves, and what `unflatten` needs to make the same of others."""
    outer, spec = tree_flatten(tree)
    leaves: list[Any] = []
    inner: list[tuple[int, Any, Any]] = []  # by dataclass: how many leaves it has, itself, and what it holds
    for leaf in outer:
        if is_dataclass(leaf) and not isinstance(leaf, type):
            held, of_held = flatten({f.name: getattr(leaf, f.name) for f in fields(leaf)})
            inner.append((len(held), leaf, of_held))
            leaves += held
        else:
            inner.append((1, None, None))
            leaves.append(leaf)
    return leaves, (spec, inner)


def unflatten(leaves: list[Any], spec: Spec) -> Any:
    """What has these leaves; dataclasses are copies of those that there were."""
    outer, begin = [], 0
    for length, original, of_held in spec[1]:
        some = leaves[begin : begin + length]
        begin += length
        if original is None:
            outer.append(some[0])
            continue
        made = copy.copy(original)
        for name, x in unflatten(some, of_held).items():
            object.__setattr__(made, name, x)  # it may be frozen
        outer.append(made)
    return tree_unflatten(outer, spec[0])


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]
