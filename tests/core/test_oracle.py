"""The oracle against games whose values are known, and against torch's own optimizers."""

import itertools

import pytest
import torch
from torch.optim import SGD, AdamW

from inrun import InrunError
from inrun.oracle import StepGame, exact_shapley, monte_carlo_shapley, per_example_gradients
from tests.models import CASES, class_losses, mlp, vectors


def test_exact_values_of_the_glove_game() -> None:
    """One left glove, two right ones; a pair is worth 1: the values are 2/3, 1/6, 1/6."""
    values = exact_shapley(lambda s: float(0 in s and len(s) > 1), 3)
    torch.testing.assert_close(values, torch.tensor([2 / 3, 1 / 6, 1 / 6], dtype=torch.float64))


def test_exact_values_are_the_mean_over_all_orders() -> None:
    generator = torch.Generator().manual_seed(0)
    worth = {
        frozenset(s): float(torch.randn((), generator=generator))
        for k in range(5)
        for s in itertools.combinations(range(4), k)
    }
    marginal = torch.zeros(4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        for k, i in enumerate(order):
            marginal[i] += (worth[frozenset(order[: k + 1])] - worth[frozenset(order[:k])]) / 24
    torch.testing.assert_close(exact_shapley(worth.__getitem__, 4), marginal)


@pytest.mark.parametrize("players", [0, 15])
def test_too_many_players_are_refused(players: int) -> None:
    with pytest.raises(InrunError, match=f"{players} players"):
        exact_shapley(lambda s: 0.0, players)


def test_monte_carlo_states_its_error() -> None:
    """Over many seeds the exact value lies within two standard errors about as often as it should."""
    exact = exact_shapley(lambda s: float(len(s)) ** 2 + 3.0 * (0 in s), 5)
    near = []
    for seed in range(60):
        values, error = monte_carlo_shapley(
            lambda s: float(len(s)) ** 2 + 3.0 * (0 in s), 5, permutations=30, seed=seed
        )
        near += (((values - exact).abs() <= 2 * error) | (error == 0)).tolist()
    assert 0.88 < sum(near) / len(near) < 1.0


def test_per_example_gradients_add_up_to_the_batchs() -> None:
    for case in CASES.values():
        model = case.build()
        batch = case.batch(4, 0)
        g = per_example_gradients(model, case.parts(batch, 4))
        case.loss(model, batch).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(g[name].sum(0), p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), lambda p: AdamW(p, lr=0.01)]
)
def test_the_games_move_is_the_optimizers_and_disturbs_nothing(kind: object) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = kind(model.parameters())  # type: ignore[operator]
    for step in range(3):
        optimizer.zero_grad()
        class_losses(model, vectors(4, step)).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    batch, target = vectors(4, 10), vectors(3, 11)
    g = per_example_gradients(model, lambda m: class_losses(m, batch) / 4)
    game = StepGame(model, optimizer, g, lambda m: class_losses(m, target).mean())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    utility = game(frozenset({1, 3}))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    nothing = game.loss_after(frozenset())
    for name, p in model.named_parameters():
        p.grad = g[name][1] + g[name][3]
    optimizer.step()
    with torch.no_grad():
        after = float(class_losses(model, target).mean())
    assert utility == pytest.approx(nothing - after, abs=1e-7)
