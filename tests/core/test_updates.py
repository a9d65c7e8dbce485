"""Every displacement against the torch optimizer's real step, and every chord against the quotient that defines it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW, Optimizer

from inrun import InrunError
from inrun.update import Moved, supported_optimizers, update_of
from tests.reference import real_move

rates = st.floats(1e-4, 0.5)
decays = st.sampled_from([0.0, 0.01, 0.3])
flags = st.booleans()
sgd = st.fixed_dictionaries(
    {"lr": rates, "momentum": st.sampled_from([0.0, 0.5, 0.9]), "dampening": st.sampled_from([0.0, 0.4]),
     "weight_decay": decays, "maximize": flags, "nesterov": flags,
     "how": st.sampled_from(["single", "foreach", "fused"])}
)  # fmt: skip
adam = st.fixed_dictionaries(
    {"lr": rates, "betas": st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.5, 0.5)]),
     "eps": st.sampled_from([1e-8, 1e-3]), "weight_decay": decays, "amsgrad": flags, "maximize": flags,
     "how": st.sampled_from(["single", "foreach", "fused"])}
)  # fmt: skip


def check(kind: type[Optimizer], given: dict[str, Any], seed: int) -> None:
    """Over eight steps with gradients of every size, some zero: the move, the midpoint of the path, and the chord."""
    how = given.pop("how")
    given |= {"foreach": how == "foreach", "fused": how == "fused"}
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(40, generator=generator, dtype=torch.float64))
    optimizer = kind([p], **given)
    update = update_of(optimizer)
    for step in range(8):
        p.grad = torch.randn(40, generator=generator, dtype=torch.float64) * 10.0 ** (step % 4 - 2)
        p.grad[step] = 0.0
        moved = Moved(p.detach(), p.grad, optimizer.state[p], optimizer.param_groups[0])
        for s in (0.0, 0.25, 1.0):
            torch.testing.assert_close(update.displacement(moved, s), real_move(optimizer, s)[p], rtol=1e-9, atol=1e-13)
        for a, b in ((0.0, 1.0), (0.25, 0.5)):
            difference = update.displacement(moved, a) - update.displacement(moved, b)
            torch.testing.assert_close(update.chord(moved, a, b) * p.grad, difference, rtol=1e-7, atol=1e-12)
        optimizer.step()


@settings(max_examples=40, deadline=None)
@given(sgd, st.integers(0, 2**16))
def test_sgd(given: dict[str, Any], seed: int) -> None:
    given["nesterov"] = given["nesterov"] and given["momentum"] > 0 and given["dampening"] == 0
    check(SGD, given, seed)


@settings(max_examples=60, deadline=None)
@given(adam, flags, st.integers(0, 2**16))
def test_adam_and_adamw(given: dict[str, Any], decoupled: bool, seed: int) -> None:
    check(AdamW if decoupled else Adam, given, seed)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([True, False]), decays)
def test_the_chord_does_not_cancel_where_the_gradient_is_tiny(amsgrad: bool, decay: float) -> None:
    """In float32 the quotient of two moves is noise for a gradient of 1e-9; the chord must equal the one in float64."""
    generator = torch.Generator().manual_seed(1)
    chords = {}
    weight, first, tiny = (torch.randn(30, generator=generator, dtype=torch.float64) for _ in range(3))
    for dtype in (torch.float64, torch.float32):
        p = torch.nn.Parameter(weight.to(dtype).clone())
        optimizer = Adam([p], lr=1e-2, amsgrad=amsgrad, weight_decay=decay)
        p.grad = first.to(dtype)
        optimizer.step()
        p.grad = (1e-9 * tiny).to(dtype)
        moved = Moved(p.detach(), p.grad, optimizer.state[p], optimizer.param_groups[0])
        chords[dtype] = update_of(optimizer).chord(moved, 0.0, 1.0).double()
    torch.testing.assert_close(chords[torch.float32], chords[torch.float64], rtol=1e-3, atol=0.0)


def test_plain_sgds_chord_is_exactly_the_learning_rate() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1e-30, 0.0, 5.0])
    optimizer = SGD([p], lr=0.07)
    moved = Moved(p.detach(), p.grad, optimizer.state[p], optimizer.param_groups[0])
    assert torch.equal(update_of(optimizer).chord(moved, 0.0, 1.0), torch.full((3,), 0.07))


def test_momentum_and_decay_are_told_apart() -> None:
    """Without decay, D(0) is what momentum alone does: nothing at all at the first step."""
    for kind in (SGD, Adam, AdamW):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = kind([p], lr=0.1, weight_decay=0.5)
        moved = Moved(p.detach(), p.grad, optimizer.state[p], optimizer.param_groups[0])
        update = update_of(optimizer)
        assert torch.equal(update.displacement(moved, 0.0, decay=False), torch.zeros(3))
        assert bool((update.displacement(moved, 0.0) < 0).all())


def test_an_unknown_optimizer_is_refused_with_a_way_out() -> None:
    class MyAdam(Adam):
        """A subclass may move otherwise, so it is not taken for its parent."""

    assert supported_optimizers() == ["Adam", "AdamW", "SGD"]
    for optimizer in (torch.optim.Rprop([torch.ones(1)]), MyAdam([torch.ones(1)])):
        with pytest.raises(InrunError, match=r"not supported. Supported.*Adam, AdamW, SGD.*To add one"):
            update_of(optimizer)
