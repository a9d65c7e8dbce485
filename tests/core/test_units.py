"""Which module is a parameter's unit, by how the model uses it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD

from inrun import Attributor, InrunError
from inrun.units import Units
from tests.models import class_losses, vectors


def units_of(model: nn.Module, ledger: Path | None = None, examples: int = 4) -> dict[str, list[str]]:
    """After a batch: by unit, the names of its parameters."""
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    target = {"t": vectors(3, 1)}
    attributor = Attributor(model, optimizer, target, lambda m, b: class_losses(m, b).mean(), ledger=ledger)
    with attributor:
        with attributor.batch(range(examples)):
            class_losses(model, vectors(examples, 0)).mean().backward()
        optimizer.step()
    return {unit.name: list(unit.parameters) for unit in attributor._units.all}


class Block(nn.Module):
    """A layer, and what `use` makes of it."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.layer, self.other, self.use = nn.Linear(6, 6), nn.Linear(6, 6), use

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(x)
        if self.use != "read alone":
            y = self.layer(y)
        if self.use != "called alone":
            y = F.linear(y.tanh(), self.layer.weight)
        return y


class Model(nn.Module):
    def __init__(self, use: str) -> None:
        super().__init__()
        self.block, self.head = Block(use), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(x))
        return logits


OTHERS = {"block.other": ["weight", "bias"], "head": ["weight", "bias"]}


@pytest.mark.parametrize(
    ("use", "found"),
    [
        ("called alone", {"block.layer": ["weight", "bias"]}),
        ("called and read", {"block": ["layer.weight"], "block.layer": ["bias"]}),
        # what nobody uses stays where it is
        ("read alone", {"block": ["layer.weight"], "block.layer": ["weight", "bias"]}),
    ],
)
def test_a_parameter_goes_to_the_innermost_module_that_sees_all_of_its_uses(
    use: str, found: dict[str, list[str]]
) -> None:
    assert units_of(Model(use)) == {**OTHERS, **found}


class Tied(nn.Module):
    """A head whose bias is its last layer's, as in BERT: each use is inside of a call of an owner."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.bias = nn.Linear(6, 6), nn.Linear(6, 3), nn.Parameter(torch.zeros(3))
        self.last.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x))
        return logits


def test_a_parameter_that_a_module_around_owns_too_is_not_lifted() -> None:
    assert units_of(Tied()) == {"Tied": ["bias"], "first": ["weight", "bias"], "last": ["weight", "bias"]}


def test_frozen_parameters_have_no_unit() -> None:
    model = Model("read alone")
    model.block.requires_grad_(False)
    assert units_of(model) == {"head": ["weight", "bias"]}
    assert not model.block.layer._forward_hooks


def test_what_was_found_out_stands_in_the_ledger(tmp_path: Path) -> None:
    units_of(Model("called and read"), tmp_path / "run")
    coverage = json.loads((tmp_path / "run" / "run.json").read_text())["coverage"]
    assert coverage["block"] == {
        "module": "Block", "parameters": 36, "rule": "forward mode", "lifted": ["layer.weight"]
    }  # fmt: skip
    assert coverage["block.layer"]["parameters"] == 6


class HalfSwapped(Model):
    """Another weight in its layer's place, but its own bias."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional_call(self.block.layer, {"weight": 2 * self.block.layer.weight}, (x,))
        logits: Tensor = self.head(y)
        return logits


def test_a_module_with_some_of_its_parameters_replaced_is_told() -> None:
    with pytest.raises(InrunError, match=r"^block\.layer: .* by functional_call"):
        units_of(HalfSwapped("called alone"))


def test_a_use_that_no_module_sees_is_told() -> None:
    model = Model("called alone")
    units = Units(model, {p: name for name, p in model.named_parameters()})
    weight = model.get_parameter("head.weight")
    assert not units.settle({weight: [(model, model.head)]}, {})
    with pytest.raises(InrunError, match=r"^head\.weight is used where no module that holds it is being called"):
        units.settle({weight: [(model.block,)]}, {})


def test_a_unit_that_is_given_up_hands_its_parameters_to_the_module_around_it() -> None:
    model = Model("called alone")
    units = Units(model, {p: name for name, p in model.named_parameters()})
    layer = model.block.layer
    stack = (model, model.block, layer)
    reads = {p: [stack] for p in layer.parameters()}
    (unit,) = [u for u in units.all if u.module is layer]
    problem = InrunError("block.layer: cannot tell")
    for around in ("block", "Model"):
        assert set(units.settle(reads, {unit: problem})) == set(layer.parameters())
        (unit,) = [u for u in units.all if u.lifted]
        assert (unit.name, {*unit.parameters.values()}) == (around, set(layer.parameters()))
        assert not units.settle(reads, {})
    with pytest.raises(InrunError, match=r"^block\.layer: cannot tell"):
        units.settle(reads, {unit: InrunError("Model: cannot tell")})
