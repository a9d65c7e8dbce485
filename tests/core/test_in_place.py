"""Units whose output is changed in place after them, as by nn.ReLU(inplace=True)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from inrun import Attributor
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import VOCABULARY, Case, class_losses, tokens, vectors
from tests.reference import contracted, reference_direction


class Turned(nn.Module):
    """A unit of its own whose output is a view in another order than the memory's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).transpose(1, 2)


def hugging_face_linear() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 4)


def sequences(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = vectors(6 * n, seed)
    return x[:, :4].contiguous().view(n, 6, 4), y[:n]


def words(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return tokens(n, seed, 6), vectors(n, seed)[1]


# a unit, whose output is changed in place, by what it is called with
IN_PLACE: dict[str, tuple[Any, Any]] = {
    "linear, 2-D": (lambda: nn.Linear(6, 5), vectors),
    "linear, 3-D": (lambda: nn.Linear(4, 5), sequences),
    "linear, 3-D, no bias": (lambda: nn.Linear(4, 5, bias=False), sequences),
    "hugging-face": (hugging_face_linear, sequences),
    "convolution": (lambda: nn.Conv1d(6, 5, 2), sequences),
    "norm": (lambda: nn.LayerNorm(4), sequences),
    "embedding": (lambda: nn.Embedding(VOCABULARY, 5), words),
    "turned": (Turned, sequences),
}
CHANGES: dict[str, Any] = {
    "relu": nn.ReLU(inplace=True),
    "add": lambda y: y.mul_(2).add_(1),
    "a part": lambda y: y[:, :2].relu_(),
    "dropout": nn.Dropout(0.5, inplace=True),
    "reshaped": lambda y: y.view(-1).relu_() if y.is_contiguous() else y.relu_(),
}


class ChangedInPlace(nn.Module):
    def __init__(self, unit: nn.Module, change: Any) -> None:
        super().__init__()
        self.unit, self.change, self.head = unit, change, nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.unit(x)
        self.change(y)
        return torch.as_tensor(self.head(y.flatten(1)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_output_that_is_changed_in_place(name: str, change: str) -> None:
    """The values are the oracle's for every kernel, and the training is what it is without."""
    build, batches = IN_PLACE[name]
    ways: list[tuple[Any, Kernel]] = [
        *(("first", kernel) for kernel in ("tangent", "perexample", "ghost", "auto")),
        *(("path", kernel) for kernel in ("tangent", "perexample")),
    ]
    for scheme, kernel in ways:
        torch.manual_seed(0)
        model = ChangedInPlace(build(), CHANGES[change])
        batch, target = batches(4, 1), batches(3, 2)
        case = Case(lambda: model, batches, class_losses)  # noqa: B023
        case.loss(model, batch)  # the head takes its shape
        optimizer = SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        wanted = torch.autograd.grad(case.loss(model, batch), list(model.parameters()))
        torch.manual_seed(3)
        g = per_example_gradients(model, case.parts(batch, 4))
        with Attributor(model, optimizer, {"t": target}, case.loss, scheme=scheme, kernel=kernel) as attributor:
            torch.manual_seed(3)
            with attributor.batch(range(4)):
                case.loss(model, batch).backward()
            for p, gradient in zip(model.parameters(), wanted, strict=True):
                assert p.grad is not None
                same = torch.equal(p.grad, gradient) if kernel == "tangent" else torch.allclose(p.grad, gradient)
                assert same
            q = reference_direction(model, optimizer, case.at(target), scheme, 1)
            optimizer.step()
        assert attributor.last is not None
        torch.testing.assert_close(attributor.last.values["t"], contracted(model, g, q), rtol=1e-9, atol=1e-12)
