"""Models that mix the examples of a batch: a value is what went through the own rows, and a warning says so."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor, MixedExamplesWarning
from inrun.kernels import Kernel
from tests.models import Case, class_losses, vectors
from tests.reference import contracted, reference_direction
from tests.zoo.check import WAYS, Scheme

pytestmark = pytest.mark.usefixtures("float64")


class Normed(nn.Module):
    """A convolution, a normalisation over the batch, and classes."""

    def __init__(self, by_module: bool = True) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(2, 5, 2, bias=False), nn.BatchNorm1d(5), nn.Linear(10, 3)
        nn.init.uniform_(self.norm.weight)
        self.norm.bias.requires_grad_(by_module)
        self.by_module = by_module

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.view(len(x), 2, 3))
        if self.by_module:
            y = self.norm(y)
        else:
            y = F.batch_norm(y, None, None, training=self.training) if self.training else y
        logits: Tensor = self.last(y.relu().flatten(1))
        return logits


def with_copies(model: Normed, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """By parameter, the gradient of a copy of it that one example's rows are computed with: [examples, *shape]."""
    x, _ = batch
    own = {name: torch.stack([p.detach()] * len(x)).requires_grad_() for name, p in model.named_parameters()}

    y = torch.cat([F.conv1d(one[None], w) for one, w in zip(x.view(len(x), 2, 3), own["first.weight"], strict=True)])
    y = F.batch_norm(y, None, None, training=True)
    if model.by_module:
        y = y * own["norm.weight"][..., None] + own["norm.bias"][..., None]
    losses = F.cross_entropy(
        torch.einsum("ni,noi->no", y.relu().flatten(1), own["last.weight"]) + own["last.bias"], batch[1]
    )
    losses.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()}


@pytest.mark.parametrize(("scheme", "kind", "kernel"), [*WAYS, ("path", AdamW, "perexample")])
@pytest.mark.parametrize("by_module", [True, False])
def test_a_value_is_what_went_through_the_own_rows(
    scheme: Scheme, kind: type[Optimizer], kernel: Kernel, by_module: bool
) -> None:
    model = Normed(by_module)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trained, lr=0.1 if kind is SGD else 1e-2)  # type: ignore[call-arg]
    case = Case(lambda: model, vectors, class_losses)
    with Attributor(model, optimizer, {"t": case.batch(3, 90)}, case.loss, scheme=scheme, kernel=kernel) as attributor:
        for step in range(3):
            batch = case.batch(6, step)
            optimizer.zero_grad()
            with warnings.catch_warnings(record=True) as caught, attributor.batch(range(6)):
                warnings.simplefilter("always")
                case.loss(model, batch).backward()
            (*told,) = [w for w in caught if w.category is MixedExamplesWarning]
            assert len(told) == (step == 0)
            assert all(("norm" in str(w.message)) for w in told if by_module)
            g = with_copies(model, batch)
            q = reference_direction(model, optimizer, case.at(case.batch(3, 90)), scheme, 1)
            optimizer.step()
            assert attributor.last is not None
            wanted = contracted(model, g, q)
            torch.testing.assert_close(attributor.last.values["t"], wanted, rtol=1e-8, atol=1e-12)
