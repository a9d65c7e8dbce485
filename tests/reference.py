"""An independent way to the credit direction: the real optimizer's moves and plain autograd."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def real_move(optimizer: Optimizer, s: float) -> dict[nn.Parameter, Tensor]:
    """D(s G): what a copy of the optimizer does to every parameter that has a gradient G."""
    trial = copy.deepcopy(optimizer)
    pairs = [
        (p, other)
        for group, trial_group in zip(optimizer.param_groups, trial.param_groups, strict=True)
        for p, other in zip(group["params"], trial_group["params"], strict=True)
        if p.grad is not None
    ]
    for p, other in pairs:
        assert p.grad is not None
        other.grad = p.grad * s
    trial.step()
    return {p: other.detach() - p.detach() for p, other in pairs}


def reference_direction(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module], Tensor], scheme: str, nodes: int
) -> dict[nn.Parameter, Tensor]:
    """q by the table of inrun.direction, from measured moves: the gradient in the middle of every piece's chord."""
    q: dict[nn.Parameter, Tensor] = {}
    for k in range(nodes):
        a, b = k / nodes, (k + 1) / nodes
        low, high = real_move(optimizer, a), real_move(optimizer, b)
        middle = {p: (low[p] + high[p]) / 2 for p in low} if scheme == "path" else {}
        kept = {p: p.detach().clone() for p in low}
        model.eval()
        with torch.no_grad():
            for p, move in middle.items():
                p.add_(move)
        gradients = torch.autograd.grad(loss(model), list(low), allow_unused=True)
        with torch.no_grad():
            for p, weight in kept.items():
                p.copy_(weight)
        model.train()
        for p, gradient in zip(low, gradients, strict=True):
            if gradient is not None:
                assert p.grad is not None
                chord = torch.where(p.grad == 0, 0.0, (low[p] - high[p]) / p.grad)
                q[p] = q.get(p, torch.zeros_like(p)) + chord * gradient
    return q


def contracted(model: nn.Module, g: Mapping[str, Tensor], q: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """<g_i, q> from every example's gradients by name, [examples, *shape]: [examples]."""
    found = sum((g[name] * q[p]).flatten(1).sum(1) for name, p in model.named_parameters() if p in q)
    assert isinstance(found, Tensor)
    return found
