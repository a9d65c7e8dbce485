"""Models that torch.compile compiled, before or after the Attributor was attached."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import AdamW

from inrun import Attributor
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import CASES
from tests.reference import contracted, reference_direction

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
CASE = CASES["gpt"]


def wrapped(model: nn.Module, counter: CompileCounter) -> nn.Module:
    found: nn.Module = torch.compile(model, backend=counter)  # type: ignore[assignment]
    return found


def in_place(model: nn.Module, counter: CompileCounter) -> nn.Module:
    model.compile(backend=counter)
    return model


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("kernel", ["tangent", "perexample"])
@pytest.mark.parametrize("compiled", [wrapped, in_place])
@pytest.mark.parametrize("when", ["before, and run", "before", "after"])
def test_values_are_the_oracles(when: str, compiled: Callable[..., nn.Module], kernel: Kernel) -> None:
    torch.manual_seed(0)
    plain, counter = CASE.build(), CompileCounter()
    optimizer = AdamW(plain.parameters(), lr=1e-3)
    target: Any = CASE.batch(3, 90)
    model = compiled(plain, counter) if when != "after" else plain
    if when == "before, and run":
        CASE.loss(model, CASE.batch(4, 1)).backward()
        optimizer.zero_grad()
        assert counter.frame_count > 0
    with Attributor(model, optimizer, {"t": target}, CASE.loss, kernel=kernel) as attributor:
        model = compiled(plain, counter) if when == "after" else model
        for step in range(2):
            batch = CASE.batch(4, step)
            g = per_example_gradients(plain, CASE.parts(batch, 4))
            with attributor.batch(range(4)):
                CASE.loss(model, batch).backward()
            q = reference_direction(plain, optimizer, CASE.at(target), "path", 1)
            optimizer.step()
            optimizer.zero_grad()
            wanted = contracted(plain, g, q)
            assert attributor.last is not None
            torch.testing.assert_close(attributor.last.values["t"], wanted, rtol=1e-9, atol=1e-12)


def test_the_users_own_graphs_are_left_alone() -> None:
    """What was compiled before is used again after a batch, and in between for what is no batch."""
    plain, counter = CASE.build(), CompileCounter()
    model = wrapped(plain, counter)
    batch = CASE.batch(4, 1)
    optimizer = AdamW(plain.parameters(), lr=1e-3)
    CASE.loss(model, batch).backward()
    optimizer.zero_grad()
    before = counter.frame_count
    attributor = Attributor(model, optimizer, {"t": CASE.batch(3, 90)}, CASE.loss)
    with attributor.batch(range(4)):
        CASE.loss(model, batch).backward()
    optimizer.step()
    assert counter.frame_count == before
    attributor.close()
    ran = counter.op_count
    CASE.loss(model, batch)
    assert counter.frame_count == before
    assert counter.op_count == ran
