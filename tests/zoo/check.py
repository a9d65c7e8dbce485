"""An architecture's values against <g_i, q>: g_i by one backward pass each, q from the optimizer's real moves."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_map

from inrun import Attributor
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from inrun.state import State
from tests.reference import contracted, reference_direction
from tests.zoo.entry import Entry

Scheme = Literal["first", "path"]
WAYS: list[tuple[Scheme, type[Optimizer], Kernel]] = [
    (scheme, kind, kernel) for scheme in ("first", "path") for kind in (SGD, AdamW) for kernel in ("auto", "tangent")
]
PAIRED = [(scheme, kind, kernel) for scheme, kind, kernel in WAYS if (scheme == "first") == (kind is SGD)]


def prepared(entry: Entry, kind: type[Optimizer]) -> tuple[nn.Module, Optimizer]:
    """SGD from the first step of training on, AdamW after one."""
    torch.manual_seed(0)
    model = entry.build()
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind is SGD:
        return model, SGD(trained, lr=0.1)
    optimizer = AdamW(trained, lr=1e-2, weight_decay=0.1)
    entry.loss(model, entry.batch(entry.examples, 7)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def doubled(model: nn.Module, optimizer: Optimizer, *data: Any) -> tuple[nn.Module, Optimizer, Any]:
    """A copy of it all in double precision."""

    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    for module in model.modules():  # what was computed in the last forward pass cannot be copied, nor need it be
        vars(module).update({n: x.detach() for n, x in vars(module).items() if isinstance(x, Tensor) and not x.is_leaf})
    model, optimizer, data = copy.deepcopy((model, optimizer, data))
    model.double()
    with_experts: Any = model
    if hasattr(model, "set_experts_implementation"):
        with_experts.set_experts_implementation("eager")  # the others have no double precision
    for p, state in optimizer.state.items():
        state.update({name: double(x) for name, x in state.items() if name != "step"})
        assert p.dtype == torch.float64
    return model, optimizer, tree_map(double, data)


def largest_error(
    entry: Entry, scheme: Scheme, kind: type[Optimizer], kernel: Kernel, steps: int = 2, twin: bool = False
) -> float:
    """Of some attributed steps, the largest error of a value, relative to the largest value.

    `twin`: against a copy of the model in double precision. Raises what attaching or valuing raises.
    """
    model, optimizer = prepared(entry, kind)
    target, n = entry.batch(3, 90), entry.examples
    found = []
    with Attributor(model, optimizer, {"t": target}, entry.loss, scheme=scheme, kernel=kernel) as attributor:
        for step in range(steps):
            batch = entry.batch(n, step)
            optimizer.zero_grad()
            its_model, its_optimizer, its_target, its_batch = model, optimizer, target, batch
            if twin:
                its_model, its_optimizer, (its_target, its_batch) = doubled(model, optimizer, target, batch)
            with State(its_model).copied():
                g = per_example_gradients(its_model, entry.parts(its_batch, n))
            with attributor.batch(range(n)):
                entry.loss(model, batch).backward()
            if twin:
                entry.loss(its_model, its_batch).backward()
            q = reference_direction(its_model, its_optimizer, entry.at(its_target), scheme, 1)
            optimizer.step()
            assert attributor.last is not None
            wanted = contracted(its_model, g, q)
            assert bool((wanted != 0).all())
            found.append(float((attributor.last.values["t"] - wanted).abs().max() / wanted.abs().max()))
    return max(found)
