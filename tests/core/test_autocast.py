"""Training under autocast and a gradient scaler: the values are of the gradients that this training makes."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import CASES, Case
from tests.reference import contracted, reference_direction

MODELS = ["mlp", "gpt", "hugging-face-gpt2", "hugging-face-llama", "convolutional", "repeated"]


def cast(case: Case) -> Case:
    """The same under autocast, losses in float32."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.losses(model, batch).float()

    return Case(case.build, case.batch, losses)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kernel", ["tangent", "perexample", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_the_cast_gradients(name: str, kernel: Kernel) -> None:
    """Against g_i by autograd under the same autocast, whose rounding (8 bits) is all that may differ."""
    case = cast(CASES[name])
    torch.manual_seed(0)
    model = case.build()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    target = case.batch(4, 90)
    with Attributor(model, optimizer, {"t": target}, case.loss, kernel=kernel) as attributor:
        for step in range(3):
            batch = case.batch(6, step)
            optimizer.zero_grad()
            g = per_example_gradients(model, case.parts(batch, 6))
            with attributor.batch(range(6)):
                case.loss(model, batch).backward()
            q = reference_direction(model, optimizer, case.at(target), "path", 1)
            optimizer.step()
            wanted = contracted(model, g, q)
            assert attributor.last is not None
            assert relative(attributor.last.values["t"], wanted) < 0.03


@pytest.mark.parametrize("kernel", ["ghost", "perexample"])
def test_first_under_sgd(kernel: Kernel) -> None:
    case = cast(CASES["hugging-face-gpt2"])
    torch.manual_seed(0)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=1e-1)
    target = case.batch(4, 90)
    with Attributor(model, optimizer, {"t": target}, case.loss, scheme="first", kernel=kernel) as attributor:
        batch = case.batch(6, 1)
        g = per_example_gradients(model, case.parts(batch, 6))
        with attributor.batch(range(6)):
            case.loss(model, batch).backward()
        q = reference_direction(model, optimizer, case.at(target), "first", 1)
        optimizer.step()
    wanted = contracted(model, g, q)
    assert attributor.last is not None
    assert relative(attributor.last.values["t"], wanted) < 0.03


def test_the_target_is_evaluated_as_the_batch_was() -> None:
    """A loop that enters autocast by itself, around a loss that knows nothing of it."""
    case = CASES["gpt"]
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = case.losses(model, batch)
        seen.append(model(batch).dtype)
        return losses.mean()

    for at_once in (False, True):
        model = case.build()
        kind: type[Optimizer] = SGD if at_once else AdamW
        optimizer = kind(model.parameters(), lr=1e-3)  # type: ignore[call-arg]
        scheme: Literal["first", "path"] = "first" if at_once else "path"
        attributor = Attributor(model, optimizer, {"t": case.batch(2, 9)}, loss, scheme=scheme)
        for step in range(2):
            seen.clear()
            with attributor.batch(range(4)), torch.autocast("cpu", torch.bfloat16):
                found = case.loss(model, case.batch(4, step))
                found.backward()
            optimizer.step()
            assert set(seen) == {torch.bfloat16}
            assert all(p.grad is not None for p in model.parameters())
            optimizer.zero_grad()
        attributor.close()


def test_training_is_what_it_is_without() -> None:
    """With kernel="tangent" bit for bit; the cache of autocast holds nothing of the target's pass."""
    case = CASES["gpt"]
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = case.build()
        optimizer = AdamW(model.parameters(), lr=1e-3)
        attributor = None
        if attached:
            attributor = Attributor(model, optimizer, {"t": case.batch(2, 9)}, case.loss, kernel="tangent")
        for step in range(4):
            batch = case.batch(4, step)
            with torch.autocast("cpu", torch.bfloat16):
                if attributor is not None:
                    with attributor.batch(range(4)):
                        case.loss(model, batch).backward()
                else:
                    case.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("kernel", ["tangent", "perexample"])
def test_a_gradient_scaler(kernel: Kernel) -> None:
    """The same values as without; and a step that the scaler leaves out, for an overflow, is nobody's."""
    case = CASES["gpt"]
    found: dict[bool, Tensor] = {}
    for scaled in (False, True):
        torch.manual_seed(0)
        model = case.build()
        optimizer = AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
        values = []
        with Attributor(model, optimizer, {"t": case.batch(2, 9)}, case.loss, kernel=kernel) as attributor:
            for step in range(4):
                overflows = scaled and step == 2
                for attempt in range(1 + overflows):
                    with attributor.batch(range(4)):
                        loss = case.loss(model, case.batch(4, step))
                        scaler.scale(loss * (float("inf") if overflows and not attempt else 1.0)).backward()
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                assert attributor.step == step + 1
                assert attributor.last is not None
                values.append(attributor.last.values["t"])
        found[scaled] = torch.stack(values)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-7)
