"""Stochastic gradient descent: an affine move, whose chord is the learning rate times a constant."""

from collections.abc import Mapping

import torch
from torch import Tensor

from inrun.update.base import Back, Mix, Moved, Update, register_update


@register_update(torch.optim.SGD)
class SGDUpdate(Update):
    """torch.optim.SGD with momentum, dampening, Nesterov, weight decay and maximize."""

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        group, buffer = moved.group, moved.state.get("momentum_buffer")
        gradient = moved.gradient * (-s if group["maximize"] else s)
        if decay and group["weight_decay"] != 0:
            gradient = gradient.add(moved.weight, alpha=group["weight_decay"])
        momentum = group["momentum"]
        move = gradient
        if momentum != 0 and buffer is not None:
            move = torch.add(momentum * buffer, gradient, alpha=1 - group["dampening"])
        if momentum != 0 and group["nesterov"]:
            move = gradient.add(move, alpha=momentum)
        return move.mul(-float(group["lr"]))

    def chord(self, moved: Moved, a: float, b: float) -> Tensor:
        return torch.full_like(moved.gradient, self.rate(moved, a, b))

    def rate(self, moved: Moved, a: float, b: float) -> float:
        group = moved.group
        rate = float(group["lr"]) * (b - a)
        if group["momentum"] != 0:
            # torch does not dampen the gradient that starts the buffer
            share = 1.0 if moved.state.get("momentum_buffer") is None else 1 - group["dampening"]
            rate *= 1 + group["momentum"] * share if group["nesterov"] else share
        return -rate if group["maximize"] else rate

    def mix(self, moved: Moved) -> Mix:
        group, before = moved.group, moved.state.get("momentum_buffer")
        momentum, decay = group["momentum"], group["weight_decay"]
        return Mix(
            scale=float(group["lr"]),
            keep=momentum,
            take=1.0 if before is None else 1 - group["dampening"],
            through=0.0 if momentum == 0 else momentum if group["nesterov"] else 1.0,
            direct=1.0 if momentum == 0 or group["nesterov"] else 0.0,
            sign=-1.0 if group["maximize"] else 1.0,
            before=before if momentum != 0 else None,
            decay=decay * moved.weight if decay != 0 else None,
            pull=None,
        )

    def back(self, moved: Moved, weight: Tensor, state: Mapping[str, Tensor]) -> Back:
        group, momentum = moved.group, moved.group["momentum"]
        move = -float(group["lr"]) * weight
        gradient, before = move, dict(state)  # a buffer is left as it is while momentum is zero
        if momentum != 0:
            first = moved.state.get("momentum_buffer") is None
            buffer = move * momentum if group["nesterov"] else move
            if "momentum_buffer" in state:
                buffer = buffer + state["momentum_buffer"]
            gradient = buffer * (1.0 if first else 1 - group["dampening"])
            if group["nesterov"]:
                gradient = gradient + move
            before = {} if first else {"momentum_buffer": momentum * buffer}
        if group["weight_decay"] != 0:
            weight = weight + group["weight_decay"] * gradient
        return -gradient if group["maximize"] else gradient, weight, before
