"""What the doctor says of a model, and that it leaves it as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from inrun import InrunError
from inrun.doctor import Diagnosis, diagnose
from tests.models import CASES, class_losses, vectors
from tests.zoo import ZOO


def of(model: nn.Module, batch: Any, losses: Any = class_losses) -> Diagnosis:
    return diagnose(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), batch, losses)


def test_a_sound_model_passes_and_is_left_as_it_was() -> None:
    case = CASES["gpt"]
    model = case.build()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    case.loss(model, case.batch(3, 5)).backward()
    kept = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    found = diagnose(model, optimizer, case.batch(4, 0), case.losses)
    assert found.passed
    assert not found.problem
    assert not found.mixed
    assert set(found.errors) == {"auto", "tangent"}
    assert max(found.errors.values()) < found.tolerance == 1e-3
    assert {c.parameter for c in found.covered} == {name for name, _ in model.named_parameters()}
    assert all(c.kernel and not c.lifted for c in found.covered)
    assert sum({c.parameter: c.entries for c in found.covered}.values()) == sum(p.numel() for p in model.parameters())
    assert found.plan is not None
    assert found.plan.seconds > 0
    assert found.seconds > 0
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), kept, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not optimizer.state
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_is_the_same_in_what_is_compared() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3))
    assert of(model, vectors(5, 0)).passed


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["t5", "mpnet", "MultiheadAttention", "experts that pick tokens"])
def test_what_is_lifted_is_said_and_what_it_costs(name: str) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    found = of(entry.build(), entry.batch(entry.examples, 0), entry.losses)
    assert found.passed
    assert found.tolerance == 1e-8
    lifted = {c.unit for c in found.covered if c.lifted}
    assert lifted
    assert found.plan is not None
    assert all(row.seconds > 2e-4 for row in found.plan.rows if row.name in lifted)


def test_frozen_parameters_are_counted_and_nothing_more() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    found = of(model, vectors(4, 0))
    assert found.passed
    assert found.frozen == 35
    assert {c.parameter for c in found.covered} == {"1.weight", "1.bias"}


def test_what_no_example_uses_is_shown() -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.parts["used"](x))

    found = of(Model(), vectors(4, 0))
    assert found.passed
    assert {c.parameter for c in found.covered if not c.kernel} == {"parts.unused.weight", "parts.unused.bias"}


def test_mixed_examples_do_not_pass() -> None:
    found = of(nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3)), vectors(4, 0))
    assert not found.passed
    assert "batch normalisation in training mode" in found.mixed
    assert max(found.errors.values()) > 1e-2


def test_a_loss_that_compares_examples_does_not_pass() -> None:
    def contrast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        y = model(batch[0])
        return F.cross_entropy(y @ y.T, torch.arange(len(y)), reduction="none")

    found = of(nn.Linear(6, 3), vectors(4, 0), contrast)
    assert not found.passed
    assert not found.mixed


def test_a_refused_model_does_not_pass() -> None:
    entry = ZOO["clip, contrastive loss"]
    torch.manual_seed(0)
    found = of(entry.build(), entry.batch(4, 0), entry.losses)
    assert not found.passed
    assert "CLIPModel: cannot tell" in found.problem


@pytest.mark.parametrize("examples", [1, 3])
def test_losses_must_be_one_for_each_of_two_examples_or_more(examples: int) -> None:
    model = nn.Linear(6, 3)
    losses: Any = class_losses if examples == 1 else lambda m, b: class_losses(m, b).mean()
    with pytest.raises(InrunError, match=r"one loss per example, of two examples or more"):
        diagnose(model, SGD(model.parameters(), lr=0.1), vectors(examples, 0), losses)
