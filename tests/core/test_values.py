"""Every value against <g_i, q>: g_i by one backward pass per example, q from the real optimizer's measured moves."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from inrun import Attributor
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import CASES, Case, tokens
from tests.reference import contracted, reference_direction

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
}


def contributions(
    model: nn.Module, case: Case, batches: list[object], sizes: list[int], parts: int
) -> dict[str, Tensor]:
    """g_i of every example of an accumulated step, before clipping."""
    found: list[dict[str, Tensor]] = []
    for batch, n in zip(batches, sizes, strict=True):
        found.append(per_example_gradients(model, case.parts(batch, n * parts)))
    return {name: torch.cat([f[name] for f in found]) for name in found[0]}


def clip(model: nn.Module, how: str) -> None:
    if how == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    if how == "value":
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("kind", "scheme", "nodes", "kernel"),
    [
        *((kind, *way, "tangent") for kind in OPTIMIZERS for way in (("first", 1), ("path", 1), ("path", 3))),
        *((kind, *way, "perexample") for kind in OPTIMIZERS for way in (("first", 1), ("path", 1))),
        ("sgd", "first", 1, "ghost"),
        ("sgd", "first", 1, "auto"),
        ("adamw", "path", 1, "auto"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_values_are_the_oracles(
    name: str, kind: str, scheme: Literal["first", "path"], nodes: int, kernel: Kernel
) -> None:
    """Two targets, accumulation over uneven batches, and each way of clipping, over four steps."""
    at_once = kind == "sgd" and scheme == "first" and kernel != "tangent"  # and then no value survives its clipping
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    optimizer: Optimizer = OPTIMIZERS[kind](model.parameters())
    targets = {"one": case.batch(4, 90), "many": [case.batch(3, 91), case.batch(2, 92)]}
    attributor = Attributor(model, optimizer, targets, case.loss, scheme=scheme, nodes=nodes, kernel=kernel)
    for step, how in enumerate(("none", "norm", "none" if at_once else "value", "norm"), start=1):
        sizes = [5, 3]
        batches = [case.batch(n, 10 * step + n) for n in sizes]
        g = contributions(model, case, batches, sizes, parts=2)
        optimizer.zero_grad()
        for batch, n in zip(batches, sizes, strict=True):
            with attributor.batch([f"{step}-{n}-{i}" for i in range(n)]):
                (case.loss(model, batch) / 2).backward()
        made = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        clip(model, how)
        current = {"one": targets["one"], "many": targets["many"][step % 2]}
        q = {
            target: reference_direction(model, optimizer, case.at(batch), scheme, nodes)
            for target, batch in current.items()
        }
        received = {p: torch.where(made[p] == 0, 0.0, p.grad / made[p]) for p in made if p.grad is not None}
        optimizer.step()
        assert attributor.last is not None
        assert attributor.last.ids == [f"{step}-{n}-{i}" for n in sizes for i in range(n)]
        for target in targets:
            wanted = sum(
                (g[n] * received[p] * q[target][p]).flatten(1).sum(1)
                for n, p in model.named_parameters()
                if p in q[target]
            )
            assert isinstance(wanted, Tensor)
            error = (attributor.last.values[target] - wanted).abs().max() / wanted.abs().max()
            assert float(error) < 1e-9, (target, how)
    attributor.close()


@pytest.mark.usefixtures("float64")
def test_as_many_examples_as_tokens_are_not_mixed_up() -> None:
    """Seven examples of seven tokens: the sizes say nothing about which dimension is whose."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    batch = tokens(7, 5, length=8)
    g = per_example_gradients(model, case.parts(batch, 7))
    with Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss, scheme="first") as attributor:
        gradients = torch.autograd.grad(case.loss(model, case.batch(3, 1)), list(model.parameters()))
        with attributor.batch(range(7)):
            case.loss(model, batch).backward()
        optimizer.step()
    assert attributor.last is not None
    wanted = sum(
        (0.1 * g[n] * d).flatten(1).sum(1) for (n, _), d in zip(model.named_parameters(), gradients, strict=True)
    )
    torch.testing.assert_close(attributor.last.values["t"], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("frozen", ["wpe", "h.0", "lm_head.weight"])
def test_frozen_parts_and_parameter_groups(frozen: str) -> None:
    """Only what the optimizer moves counts, each group by its own rate; a schedule changes the rates between steps."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen) and not (frozen == "lm_head.weight" and name == "wte.weight"))
    trained: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": trained[::2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": trained[1::2]},
    ]
    optimizer = Adam(groups, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    target = case.batch(3, 1)
    with Attributor(model, optimizer, {"t": target}, case.loss) as attributor:
        for step in range(3):
            batch = case.batch(4, step)
            g = per_example_gradients(model, case.parts(batch, 4))
            with attributor.batch(range(4)):
                case.loss(model, batch).backward()
            q = reference_direction(model, optimizer, case.at(target), "path", 1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            assert attributor.last is not None
            wanted = contracted(model, g, q)
            torch.testing.assert_close(attributor.last.values["t"], wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_float32_values_are_close_to_the_oracles(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    target = case.batch(4, 90)
    with Attributor(model, optimizer, {"t": target}, case.loss) as attributor:
        for step in range(3):
            batch = case.batch(6, step)
            g = per_example_gradients(model, case.parts(batch, 6))
            optimizer.zero_grad()
            with attributor.batch(range(6)):
                case.loss(model, batch).backward()
            q = reference_direction(model, optimizer, case.at(target), "path", 1)
            optimizer.step()
            wanted = contracted(model, g, q)
            assert attributor.last is not None
            # the reference's own quotient of float32 moves cancels where the gradient is small, hence no tighter
            assert float((attributor.last.values["t"] - wanted).abs().max() / wanted.abs().max()) < 2e-3
