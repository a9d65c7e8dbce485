"""What is done to a gradient between backward and step, first at a step at which no copy of it was taken."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from inrun import Attributor, InrunError
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import CASES, GPT, tokens

GPT_CASE = CASES["gpt"]
Change = Callable[[nn.Module], object]


def by_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def scaled_past_the_versions(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.data.mul_(0.25)  # type: ignore[union-attr]


def some_rows_dropped(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad[::2] = 0  # type: ignore[index]


def turned(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.neg_()  # type: ignore[union-attr]


def with_noise(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.add_(torch.randn_like(p), alpha=1e-3)  # type: ignore[union-attr]


def some_entries_past_the_versions(model: nn.Module) -> None:
    weight = dict(model.named_parameters())["h.0.attn.c_attn.weight"]
    weight.grad.data.view(-1)[1:12] = 0  # type: ignore[union-attr]  # none of the entries that are looked at


def one_step(
    kernel: Kernel, change: Change, first: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The values of the first step at which the gradient was changed, and what they should be."""
    torch.manual_seed(0)
    model = GPT().to(dtype)
    optimizer, target = SGD(model.parameters(), lr=0.1), tokens(3, 90)
    with Attributor(model, optimizer, {"t": target}, GPT_CASE.loss, scheme="first", kernel=kernel) as attributor:
        for k in range(1, first + 1):
            batch = tokens(5, k)
            g = per_example_gradients(model, GPT_CASE.parts(batch, 5))
            along = torch.autograd.grad(GPT_CASE.loss(model, target), list(model.parameters()))
            with attributor.batch(range(5)):
                GPT_CASE.loss(model, batch).backward()
            made = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
            if k == first:
                change(model)
            scales = [torch.where(made[p] == 0, 0.0, p.grad / made[p]) for p in made if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        assert attributor.last is not None
        wanted = sum(
            (0.1 * g[name] * scale * v).flatten(1).sum(1)
            for (name, _), scale, v in zip(model.named_parameters(), scales, along, strict=True)
        )
        assert isinstance(wanted, Tensor)
        return attributor.last.values["t"], wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("change", [by_norm, by_value, scaled_past_the_versions, some_rows_dropped])
@pytest.mark.parametrize("kernel", ["tangent", "perexample", "auto"])
def test_the_first_change_is_followed(kernel: Kernel, change: Change, dtype: torch.dtype) -> None:
    if kernel != "tangent" and change in (by_value, some_rows_dropped):
        with pytest.raises(InrunError, match="kernel='tangent'"):
            one_step(kernel, change, dtype=dtype)
        return
    values, wanted = one_step(kernel, change, dtype=dtype)
    assert float((values - wanted).norm() / wanted.norm()) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("change", [turned, with_noise, some_entries_past_the_versions])
@pytest.mark.parametrize("kernel", ["tangent", "auto"])
def test_what_cannot_be_followed_is_an_error(kernel: Kernel, change: Change, first: int) -> None:
    if change is some_entries_past_the_versions and (first, kernel) == (1, "tangent"):
        values, wanted = one_step(kernel, change, first)  # there is a copy, by which they are seen
        assert float((values - wanted).norm() / wanted.norm()) < 1e-9
        return
    with pytest.raises(InrunError, match=r"changed by more than|kernel='tangent'|was not seen"):
        one_step(kernel, change, first)


def test_no_copy_is_held_while_nothing_is_done_to_gradients() -> None:
    model = GPT()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Attributor(model, optimizer, {"t": tokens(3, 90)}, GPT_CASE.loss) as attributor:
        held = []
        for k in range(5):
            with attributor.batch(range(5)):
                GPT_CASE.loss(model, tokens(5, k)).backward()
            if k == 2:
                by_norm(model)
            held.append(len(attributor._received._copies))
            optimizer.step()
            optimizer.zero_grad()
    every = len(list(model.parameters()))
    assert held == [every, 0, 0, every, every]
