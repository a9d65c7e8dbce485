"""What many optimizers have in common: the gradient that they take in, their averages, and the decoupled decay.

Every function returns a new tensor. Where the state has no entry yet the step is the first, and averages are zero.
"""

import torch
from torch import Tensor

from inrun.update.base import Moved


def received(moved: Moved, s: float, decay: bool) -> Tensor:
    """sG as the optimizer takes it in: turned round by `maximize`, with the weight decay if that is coupled to it."""
    group = moved.group
    gradient = moved.gradient * (-s if group["maximize"] else s)
    if decay and group["weight_decay"] != 0 and not group.get("decoupled_weight_decay"):
        gradient = gradient.add_(moved.weight, alpha=group["weight_decay"])
    return gradient


def before(moved: Moved, name: str) -> Tensor:
    """A tensor of the state, of the weight's shape."""
    return moved.state[name] if name in moved.state else torch.zeros_like(moved.weight)


def mean_square(square: Tensor, gradient: Tensor, beta: float) -> Tensor:
    """beta v + (1 - beta) g^2."""
    return torch.addcmul(square * beta, gradient, gradient, value=1 - beta)


def single(moved: Moved, name: str, first: float) -> Tensor:
    """A single number of the state, in the precision in which torch keeps it; at the first step it is `first`."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    if name not in moved.state:
        return torch.tensor(first, dtype=dtype, device=moved.weight.device)
    return torch.as_tensor(moved.state[name], dtype=dtype)


def steps(moved: Moved) -> float | Tensor:
    """The number of the step that is taken, from 1: a tensor if `capturable`, since torch then computes with one."""
    taken = single(moved, "step", 0.0)
    return taken + 1 if moved.group.get("capturable") else float(taken) + 1


def decayed(move: Tensor, moved: Moved, decay: bool) -> Tensor:
    """The move with the decoupled weight decay added."""
    group = moved.group
    if decay and group["weight_decay"] != 0 and group.get("decoupled_weight_decay", True):
        move = move.add(moved.weight, alpha=-float(group["lr"]) * group["weight_decay"])
    return move
