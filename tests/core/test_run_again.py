"""Units that are run again: without a forward mode, with weights of a module inside, with a state, or empty."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import SGD, AdamW

from inrun import Attributor, InrunError, MixedExamplesWarning
from inrun.oracle import per_example_gradients
from inrun.state import State
from inrun.trees import tensors
from tests.models import Case, class_losses, vectors
from tests.reference import contracted, reference_direction

pytestmark = pytest.mark.usefixtures("float64")


def agrees(build: Any, **settings: Any) -> None:
    """Two steps of `path` with AdamW and two targets, held against per-example autograd."""
    case = Case(build, vectors, class_losses)
    torch.manual_seed(0)
    model = case.build()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    targets = {"one": case.batch(3, 90), "other": case.batch(2, 91)}
    with Attributor(model, optimizer, targets, case.loss, **settings) as attributor:
        for step in range(2):
            batch = case.batch(5, step)
            g = per_example_gradients(model, case.parts(batch, 5))
            optimizer.zero_grad()
            with attributor.batch(range(5)):
                case.loss(model, batch).backward()
            q = {name: reference_direction(model, optimizer, case.at(of), "path", 1) for name, of in targets.items()}
            optimizer.step()
            assert attributor.last is not None
            for name in targets:
                wanted = contracted(model, g, q[name])
                torch.testing.assert_close(attributor.last.values[name], wanted, rtol=1e-8, atol=1e-12)


class _Square(torch.autograd.Function):
    """An operator of someone's own, with a backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.as_tensor(2 * x * gradients[0])


class _SquareOnce(_Square):
    """With a backward pass that cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.as_tensor(2 * x * gradients[0])


class _SquareOutside(_Square):
    """With one that leaves torch."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * gradients[0].detach().numpy())


class Squared(nn.Module):
    def __init__(self, square: Any) -> None:
        super().__init__()
        self.square = square
        self.scale, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.zeros(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.square.apply(x * self.scale + self.shift)
        return y


@pytest.mark.parametrize("settings", [{}, {"kernel": "tangent"}, {"memory": 100}])
@pytest.mark.filterwarnings("ignore:what a step must keep")
@pytest.mark.parametrize("square", [_Square, _SquareOnce, _SquareOutside])
def test_what_has_no_forward_mode_is_run_backwards(square: Any, settings: dict[str, Any]) -> None:
    """Twice where that can be done, and once for every example elsewhere."""
    agrees(lambda: nn.Sequential(nn.Linear(6, 6), Squared(square), nn.Linear(6, 3)), **settings)


class Attending(nn.Module):
    """Attention over the six numbers of an example, the batch in the second dimension, the weights used too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(1, 8), nn.MultiheadAttention(8, 2, **settings)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x_TBD = torch.tanh(self.first(x.T[:, :, None]))
        y_TBD, weights_BTS = self.attention(x_TBD, x_TBD, x_TBD)
        logits: Tensor = self.head(y_TBD.mean(0)) + weights_BTS.var(1).sum(1, keepdim=True)
        return logits


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 8, "vdim": 8}])
@pytest.mark.parametrize("frozen", ["", "attention.out_proj.weight", "attention.in_proj", "attention.out_proj"])
def test_attention_of_torchs_own_owns_the_weights_that_it_reads(settings: dict[str, Any], frozen: str) -> None:
    def build() -> nn.Module:
        model = Attending(**settings)
        for name, p in model.named_parameters():
            p.requires_grad_(not (frozen and name.startswith(frozen)))
        return model

    agrees(build)


class Remembering(nn.Module):
    """A module that begins in training where it ended before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.scale, self.kind, self.before = nn.Parameter(torch.ones(6)), kind, HOLDS[kind](torch.zeros(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * self.scale
        before = self.before.x if isinstance(self.before, SimpleNamespace) else tensors(self.before)[0]
        after = x * self.scale + before.tanh()
        if self.kind == "list in place":
            self.before[0] = after.detach()
        else:
            self.before = HOLDS[self.kind](after.detach())
        return after


HOLDS: dict[str, Any] = {
    "tensor": lambda x: x, "list": lambda x: [x], "list in place": lambda x: [x], "dict": lambda x: {"before": (x, 1)},
    "object": lambda x: SimpleNamespace(x=x),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["tensor", "list", "list in place", "dict"])
def test_a_module_that_keeps_a_tensor_for_the_next_call_finds_it_again(kind: str) -> None:
    def losses(model: Any, batch: Any) -> Tensor:
        return class_losses(model, batch)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Remembering(kind), nn.Linear(6, 3))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    case = Case(lambda: model, vectors, losses)
    with Attributor(model, optimizer, {"t": vectors(4, 90)}, case.loss) as attributor:
        for step in range(3):
            with State(model).copied():
                g = per_example_gradients(model, case.parts(vectors(5, step), 5))
            optimizer.zero_grad()
            with attributor.batch(range(5)):
                case.loss(model, vectors(5, step)).backward()
            q = reference_direction(model, optimizer, case.at(vectors(4, 90)), "path", 1)
            optimizer.step()
            assert attributor.last is not None
            torch.testing.assert_close(attributor.last.values["t"], contracted(model, g, q), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["tensor", "list", "list in place", "dict"])
def test_attributes_that_hold_tensors_are_as_in_training_alone(kind: str) -> None:
    def trained(attach: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), Remembering(kind), nn.Linear(6, 3))
        optimizer = SGD(model.parameters(), lr=0.1)
        target = {"t": vectors(4, 90)}
        attributor = (
            Attributor(model, optimizer, target, lambda m, b: class_losses(m, b).mean(), kernel="tangent")
            if attach
            else None
        )
        for step in range(5):
            with attributor.batch(range(5)) if attributor else nullcontext():
                class_losses(model, vectors(5, step)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    assert all(torch.equal(x, y) for x, y in zip(trained(True), trained(False), strict=True))


def test_a_module_that_cannot_be_run_again_is_named() -> None:
    torch.manual_seed(0)
    remembering = Remembering("object")
    model = nn.Sequential(nn.Linear(6, 6), remembering, nn.Linear(6, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": vectors(4, 1)}, lambda m, b: class_losses(m, b).mean())
    with warnings.catch_warnings(), attributor.batch(range(5)):
        warnings.simplefilter("ignore", MixedExamplesWarning)  # what it starts with is another each time
        class_losses(model, vectors(5, 0)).mean().backward()
    remembering.before = SimpleNamespace(x=torch.zeros(3, 6))
    with pytest.raises(InrunError, match=r"^1: it cannot be run again .* freeze the module"):
        optimizer.step()


def test_layers_without_a_feature_are_there_for_nothing() -> None:
    """As adaptive softmaxes have for their rarest classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    target = vectors(3, 1)
    with Attributor(
        model, optimizer, {"t": target}, lambda m, b: class_losses(m, b).mean(), scheme="first"
    ) as attributor:
        with attributor.batch(range(4)):
            class_losses(model, vectors(4, 0)).mean().backward()
        optimizer.step()
    assert attributor.last is not None
