"""What makes a value a Shapley value, and the plain case that anyone can check: each a property over random games."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor
from inrun.oracle import StepGame, exact_shapley, per_example_gradients
from tests.models import CASES, class_losses, vectors

seeds = st.integers(0, 2**20)
case = CASES["mlp"]


def network() -> nn.Module:
    """Without kinks, so that the midpoint rule converges as a rule should."""
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3)).double()


def optimizer_of(model: nn.Module, kind: str, rate: float) -> Optimizer:
    return SGD(model.parameters(), lr=rate, momentum=0.9) if kind == "sgd" else AdamW(model.parameters(), lr=rate)


def setting(seed: int, kind: str, rate: float = 1e-2, warm: int = 5) -> tuple[nn.Module, Optimizer]:
    """A model in double precision, some steps into its training."""
    torch.manual_seed(seed)
    model = network()
    optimizer = optimizer_of(model, kind, rate)
    for step in range(warm):
        optimizer.zero_grad()
        case.loss(model, double(vectors(6, seed + step))).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def double(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].double(), batch[1]


def values(
    model: nn.Module,
    optimizer: Optimizer,
    batch: tuple[Tensor, Tensor],
    targets: dict[str, tuple[Tensor, Tensor]],
    **settings: object,
) -> dict[str, Tensor]:
    with Attributor(model, optimizer, targets, case.loss, **settings) as attributor:  # type: ignore[arg-type]
        with attributor.batch(range(len(batch[1]))):
            case.loss(model, batch).backward()
        optimizer.step()
    assert attributor.last is not None
    return attributor.last.values


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_plain_sgd_first_is_learning_rate_times_gradient_dot_product(seed: int) -> None:
    torch.manual_seed(seed)
    model = network()
    batch, target = double(vectors(5, seed)), double(vectors(3, seed + 1))
    g = per_example_gradients(model, lambda m: class_losses(m, batch) / 5)
    at_target = torch.autograd.grad(case.loss(model, target), list(model.parameters()))
    dots = sum((g[n] * d).flatten(1).sum(1) for (n, _), d in zip(model.named_parameters(), at_target, strict=True))
    found = values(model, SGD(model.parameters(), lr=0.3), batch, {"t": target}, scheme="first")["t"]
    torch.testing.assert_close(found, 0.3 * dots, rtol=1e-12, atol=1e-15)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(["sgd", "adamw"]), st.integers(1, 3))
def test_symmetry(seed: int, kind: str, nodes: int) -> None:
    """Two equal examples have equal values, and trading places trades nothing."""
    x, y = double(vectors(5, seed))
    x[3], y[3] = x[0], y[0]
    order = torch.tensor([3, 1, 2, 0, 4])
    target = {"t": double(vectors(3, seed + 1))}
    one = values(*setting(seed, kind), (x, y), target, nodes=nodes)["t"]
    other = values(*setting(seed, kind), (x[order], y[order]), target, nodes=nodes)["t"]
    torch.testing.assert_close(one[0], one[3], rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-16)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(["sgd", "adamw"]), st.sampled_from(["first", "path"]))
def test_linearity(seed: int, kind: str, scheme: str) -> None:
    """The values for two targets joined are the sum of the two."""
    a, b = double(vectors(4, seed + 1)), double(vectors(4, seed + 2))
    joined = (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
    found = values(*setting(seed, kind), double(vectors(5, seed)), {"a": a, "b": b, "joined": joined}, scheme=scheme)
    torch.testing.assert_close(found["a"] + found["b"], 2 * found["joined"], rtol=1e-10, atol=1e-16)


@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from(["sgd", "adamw"]))
def test_efficiency(seed: int, kind: str) -> None:
    """With many nodes the values of a step add up to the loss it removed, beyond what momentum and decay did."""
    model, optimizer = setting(seed, kind, rate=0.05)
    batch, target = double(vectors(5, seed)), double(vectors(4, seed + 1))
    g = per_example_gradients(model, lambda m: class_losses(m, batch) / 5)
    removed = StepGame(model, optimizer, g, lambda m: case.loss(m, target))(frozenset(range(5)))
    errors = [
        abs(float(values(*setting(seed, kind, rate=0.05), batch, {"t": target}, nodes=nodes)["t"].sum()) - removed)
        for nodes in (4, 64)
    ]
    assert errors[1] <= 1e-4 * max(abs(removed), 1e-3)
    assert errors[1] <= errors[0] / 50 + 1e-9


def test_twice_the_nodes_leave_a_quarter_of_the_error() -> None:
    """Efficiency is reached at the second order of the midpoint rule."""
    torch.manual_seed(0)
    model = network()
    batch, target = double(vectors(5, 0)), double(vectors(4, 1))
    g = per_example_gradients(model, lambda m: class_losses(m, batch) / 5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    removed = StepGame(model, SGD(model.parameters(), lr=2.0), g, lambda m: F.cross_entropy(m(target[0]), target[1]))(
        frozenset(range(5))
    )
    errors = []
    for nodes in (4, 8, 16):
        model.load_state_dict(start)
        model.zero_grad()
        found = values(model, SGD(model.parameters(), lr=2.0), batch, {"t": target}, nodes=nodes)["t"]
        errors.append(abs(float(found.sum()) - removed))
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


@settings(max_examples=6, deadline=None)
@given(seeds, st.sampled_from(["sgd", "adamw"]))
def test_path_is_close_to_the_exact_shapley_values_of_a_small_step(seed: int, kind: str) -> None:
    model, optimizer = setting(seed, kind, rate=1e-3, warm=30)
    batch, target = double(vectors(6, seed)), double(vectors(4, seed + 1))
    g = per_example_gradients(model, lambda m: class_losses(m, batch) / 6)
    game = StepGame(model, optimizer, g, lambda m: case.loss(m, target))
    exact = exact_shapley(game, 6)
    found = values(model, optimizer, batch, {"t": target}, nodes=4)["t"]
    assert float((found - exact).norm() / exact.norm()) < 0.05
