"""What the studies compare with, against its definition, on a small network."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from experiments import baselines
from experiments.baselines import Example, Weights


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def train() -> Example:
    return torch.randn(70, 4, dtype=torch.float64), torch.randint(3, (70,))


@pytest.fixture
def targets() -> list[Example]:
    return [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (60, 1)]


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the mean loss, in one row."""
    loss = F.cross_entropy(model(x), y)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def test_products_and_cosines(model: nn.Module, train: Example, targets: list[Example]) -> None:
    def one(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    g_ND = torch.stack([by_hand(model, x[None], y[None]) for x, y in zip(*train, strict=True)])
    wanted_TD = torch.stack([by_hand(model, *target) for target in targets])
    weights = baselines.weights_of(model)
    found = baselines.products(weights, one, train, targets)
    np.testing.assert_allclose(found, (wanted_TD @ g_ND.T).numpy(), atol=1e-12)
    cosines = F.cosine_similarity(wanted_TD[:, None], g_ND[None], dim=2)
    np.testing.assert_allclose(baselines.products(weights, one, train, targets, cosine=True), cosines.numpy())
    twice = baselines.tracin([weights, weights], [0.5, 0.25], one, train, targets)
    np.testing.assert_allclose(twice, 0.75 * found)


def test_influence_solves_with_the_damped_hessian(model: nn.Module, train: Example, targets: list[Example]) -> None:
    def one(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    weights = baselines.weights_of(model)
    sizes = [part.numel() for part in weights.values()]

    def mean(vector: Tensor) -> Tensor:
        parts = zip(weights.items(), torch.split(vector, sizes), strict=True)
        named = {name: part.view_as(of) for (name, of), part in parts}
        return F.cross_entropy(functional_call(model, named, (train[0],)), train[1])

    flat = torch.cat([part.flatten() for part in weights.values()])
    hessian = torch.autograd.functional.hessian(mean, flat) + 1.0 * torch.eye(len(flat), dtype=torch.float64)
    g_ND = torch.stack([by_hand(model, x[None], y[None]) for x, y in zip(*train, strict=True)])
    wanted = torch.stack([g_ND @ torch.linalg.solve(hessian, by_hand(model, *target)) for target in targets])
    found = baselines.influence(weights, one, train, targets, damping=1.0, iterations=60)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-8)


def test_trak_is_its_formula_but_for_the_projection(model: nn.Module, train: Example) -> None:
    model, train = model.float(), (train[0].float(), train[1])

    def one(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    before = baselines.weights_of(model)
    targets = [(train[0][:1], train[1][:1]), (train[0][5:25], train[1][5:25])]
    found = baselines.trak(model, [before, before], one, train, targets, dimensions=32)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert found[0].argmax() == 0

    def margin(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return torch.logit(torch.exp(-one(weights, x, y)))

    parts = vmap(grad(margin), in_dims=(None, 0, 0))(before, *train)
    g_ND = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
    weighted = g_ND @ torch.linalg.pinv(g_ND.T @ g_ND) @ g_ND.T  # as without a projection
    weighted *= 1 - torch.exp(-vmap(one, in_dims=(None, 0, 0))(before, *train))[:, None]
    wanted = torch.stack([weighted[:, 0], weighted[:, 5:25].mean(dim=1)]).numpy()
    for row, expected in zip(found, wanted, strict=True):
        assert np.corrcoef(row, expected)[0, 1] > 0.85  # found: 0.97, 0.89
