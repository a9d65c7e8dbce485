"""An architecture's values against <g_i, q>: g_i by one backward pass each, q from the optimizer's real moves."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from inrun.state import State
from tests.reference import contracted, reference_direction
from tests.zoo.entry import Entry

Scheme = Literal["first", "path"]
WAYS: list[tuple[Scheme, Kernel]] = [("first", "auto"), ("first", "tangent"), ("path", "auto"), ("path", "tangent")]


def prepared(entry: Entry, scheme: Scheme) -> tuple[nn.Module, Optimizer]:
    """`first` begins with SGD at the first step of training, `path` with AdamW after one."""
    torch.manual_seed(0)
    model = entry.build()
    trained = [p for p in model.parameters() if p.requires_grad]
    if scheme == "first":
        return model, SGD(trained, lr=0.1)
    optimizer = AdamW(trained, lr=1e-2, weight_decay=0.1)
    entry.loss(model, entry.batch(entry.examples, 7)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def direction(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module], Tensor], scheme: Scheme
) -> dict[nn.Parameter, Tensor]:
    """q from the optimizer's measured moves; in single precision, where they cancel, the rate times the gradient."""
    if torch.get_default_dtype() == torch.float64:
        return reference_direction(model, optimizer, loss, scheme, 1)
    assert isinstance(optimizer, SGD)
    model.eval()
    (group,) = optimizer.param_groups
    gradients = torch.autograd.grad(loss(model), group["params"], allow_unused=True)
    model.train()
    return {p: group["lr"] * g for p, g in zip(group["params"], gradients, strict=True) if g is not None}


def largest_error(entry: Entry, scheme: Scheme, kernel: Kernel, steps: int = 2) -> float:
    """Of some attributed steps, the largest error of a value, relative to the largest value.

    In double precision; in single precision for `first` alone. Raises what attaching or valuing raises.
    """
    model, optimizer = prepared(entry, scheme)
    target, n = entry.batch(3, 90), entry.examples
    found = []
    with Attributor(model, optimizer, {"t": target}, entry.loss, scheme=scheme, kernel=kernel) as attributor:
        for step in range(steps):
            batch = entry.batch(n, step)
            with State(model).copied():
                g = per_example_gradients(model, entry.parts(batch, n))
            optimizer.zero_grad()
            with attributor.batch(range(n)):
                entry.loss(model, batch).backward()
            q = direction(model, optimizer, entry.at(target), scheme)
            optimizer.step()
            assert attributor.last is not None
            wanted = contracted(model, g, q)
            assert bool((wanted != 0).all())
            found.append(float((attributor.last.values["t"] - wanted).abs().max() / wanted.abs().max()))
    return max(found)
