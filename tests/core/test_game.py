"""The real game of a step, against the oracle's with torch's own optimizers, and what it says of the values."""

import copy
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from inrun import InrunError
from inrun.game import Game, play, spearman
from inrun.ledger.schema import STEPS_SCHEMA
from inrun.oracle import StepGame, exact_shapley, monte_carlo_shapley, per_example_gradients
from inrun.parallel import Processes
from inrun.target import Evaluation, Target
from inrun.update import Moved, update_of
from tests.models import CASES, GPT, Case, token_losses, tokens

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
}
DROPPING = Case(lambda: GPT(dropout=0.2), tokens, token_losses)


class Step:
    """A model three steps into its training, and the step that comes next with its game's players."""

    def __init__(self, case: Case, kind: str, players: int, targets: int = 1) -> None:
        torch.manual_seed(0)
        self.case, self.model = case, case.build()
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        for seed in range(3):
            self.optimizer.zero_grad()
            case.loss(self.model, case.batch(4, seed)).backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.batches = [case.batch(3, 90 + k) for k in range(targets)]
        evaluation = Evaluation(Processes(self.model, alone=True))
        self.targets = [Target(f"t{k}", batch, case.loss, evaluation) for k, batch in enumerate(self.batches)]
        self.names = {p: name for name, p in self.model.named_parameters()}
        self.g = per_example_gradients(self.model, case.parts(case.batch(players, 50), players))
        for name, p in self.model.named_parameters():
            p.grad = self.g[name].sum(dim=0)
        self.players = players

    def play(self, without: str = "", **given: Any) -> dict[str, Game]:
        update = update_of(self.optimizer)
        moves: dict[nn.Parameter, Moved] = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                moves[p] = Moved(p.detach(), p.grad, self.optimizer.state.get(p, {}), group, update)
        contributions = {p: self.g[name] for p, name in self.names.items() if name != without}
        values = {target.name: torch.arange(self.players, dtype=torch.float64) for target in self.targets}
        return play(contributions, moves, self.targets, 1, values, **{"permutations": 0, **given})

    def reference(self, k: int) -> StepGame:
        return StepGame(self.model, self.optimizer, self.g, self.case.at(self.batches[k]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("name", "players"), [("mlp", 6), ("gpt", 4)])
def test_the_game_is_the_real_optimizers(name: str, players: int, kind: str) -> None:
    step = Step(CASES[name], kind, players, targets=2)
    games = step.play()
    assert list(games) == ["t0", "t1"]
    for k, game in enumerate(games.values()):
        wanted = exact_shapley(step.reference(k), players)
        assert float((game.shapley - wanted).norm() / wanted.norm()) < 1e-9
        assert game.exact
        assert game.permutations == 0
        assert torch.equal(game.noise, torch.zeros(players, dtype=torch.float64))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_parameter_without_contributions_moves_without_data_in_every_coalition(kind: str) -> None:
    step = Step(CASES["mlp"], kind, 5)
    game = step.play(without="0.weight")["t0"]
    step.g["0.weight"] = torch.zeros_like(step.g["0.weight"])
    wanted = exact_shapley(step.reference(0), 5)
    assert float((game.shapley - wanted).norm() / wanted.norm()) < 1e-9


@pytest.mark.usefixtures("float64")
def test_a_large_game_is_estimated_within_its_stated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight players, so that it can be played in full too."""
    step = Step(CASES["mlp"], "adamw", 8, targets=2)
    in_full = step.play()
    monkeypatch.setattr("inrun.game.MOST_EXACT", 7)
    for name, game in step.play(permutations=60, seed=4).items():
        assert not game.exact
        assert game.permutations == 60
        exact = in_full[name].shapley
        deviations = (game.shapley - exact) / game.noise
        assert 0.3 < float(deviations.square().mean().sqrt()) < 1.8  # of 8 values, were the errors normal: 1 +- 0.25
        assert float(game.noise.max()) < 0.2 * float(exact.abs().max())


@pytest.mark.usefixtures("float64")
def test_more_than_twelve_examples_are_played_by_random_orders() -> None:
    step = Step(CASES["mlp"], "sgd", 13, targets=2)
    for k, game in enumerate(step.play(permutations=4, seed=4).values()):
        assert game.permutations == 4
        # the orders are the seed's, and the same for every target
        shapley, noise = monte_carlo_shapley(step.reference(k), 13, 4, seed=4)
        torch.testing.assert_close(game.shapley, shapley, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(game.noise, noise, rtol=1e-7, atol=1e-12)
        whole = step.reference(k)(frozenset(range(13)))
        assert float(game.shapley.sum()) == pytest.approx(whole, rel=1e-9)  # every order adds up to the whole


def test_a_large_game_needs_two_orders_at_least() -> None:
    with pytest.raises(InrunError, match="two permutations"):
        Step(CASES["mlp"], "sgd", 13).play(permutations=1)


@pytest.mark.parametrize("case", [DROPPING, CASES["mlp"]], ids=["gpt-dropout", "mlp"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("players", "permutations"), [(4, 0), (14, 2)])
def test_nothing_is_disturbed(case: Case, kind: str, players: int, permutations: int) -> None:
    step = Step(case, kind, players)
    model = step.model.train()
    weights = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = copy.deepcopy(step.optimizer.state_dict())
    random_states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    step.play(permutations=permutations)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    kept = [p.grad for p in model.parameters()]
    assert all(x is not None and torch.equal(x, y) for x, y in zip(kept, gradients, strict=True))
    torch.testing.assert_close(step.optimizer.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert np.random.get_state()[1].tolist() == random_states[1]  # type: ignore[index]
    assert random.getstate() == random_states[2]


def test_every_coalition_is_evaluated_once_for_all_targets() -> None:
    step = Step(CASES["mlp"], "sgd", 5, targets=2)
    evaluated = 0

    def counted(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal evaluated
        evaluated += 1

    handle = step.model.register_forward_hook(counted)
    step.play()
    handle.remove()
    assert evaluated == 2 * 2**5


def game(values: list[float], shapley: list[float], **more: Any) -> Game:
    exact = torch.tensor(shapley, dtype=torch.float64)
    noise = more.pop("noise", torch.zeros_like(exact))
    return Game(exact, noise, torch.tensor(values, dtype=torch.float64), **more)


def test_errors_are_what_they_say() -> None:
    one = game([1.0, 2.0, 5.0], [1.0, 0.0, 2.0], noise=torch.tensor([3.0, 0.0, 4.0]), permutations=9)
    assert one.relative_error == pytest.approx(math.sqrt(13 / 5))
    assert one.rmse == pytest.approx(math.sqrt(13 / 3))
    assert one.spearman == pytest.approx(0.5)
    assert one.row() == {
        "game_error": one.relative_error,
        "game_rmse": one.rmse,
        "game_spearman": one.spearman,
        "game_noise": pytest.approx(math.sqrt(25 / 3)),
    }
    assert set(one.row()) <= set(STEPS_SCHEMA)


def test_errors_of_steps_without_length_and_of_losses_that_are_not_finite() -> None:
    assert game([0.0, 0.0], [0.0, 0.0]).relative_error == 0.0
    assert game([1.0, 0.0], [0.0, 0.0]).relative_error == math.inf
    broken = game([1.0, 2.0], [math.nan, 1.0])
    assert math.isnan(broken.relative_error)
    assert math.isnan(broken.rmse)
    assert broken.spearman is None


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # Wikipedia's example of IQ and hours of television: -29/165
        ([106, 100, 86, 101, 99, 103, 97, 113, 112, 110], [7, 27, 2, 50, 28, 29, 20, 12, 6, 17], -29 / 165),
        # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5
        ([1, 2, 2, 3], [5, 7, 6, 8], 4.5 / math.sqrt(4.5 * 5)),
        # ranks 1.5, 1.5, 3 and 3, 1.5, 1.5: covariance -0.75, variances 1.5
        ([0, 0, 1], [9, 4, 4], -0.5),
        ([7, 7, 7], [1, 2, 3], None),
        ([1, 2, 3], [7, 7, 7], None),
        ([1], [2], None),
        ([1, 2], [1, math.nan], None),
    ],
)
def test_rank_correlation(x: list[float], y: list[float], expected: float | None) -> None:
    found = spearman(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_rank_correlation_is_pearsons_of_ranks_counted_one_by_one(pairs: list[tuple[int, int]]) -> None:
    def ranks(column: list[int]) -> list[float]:
        return [sum(b < a for b in column) + (sum(b == a for b in column) + 1) / 2 for a in column]

    x, y = ([pair[k] for pair in pairs] for k in (0, 1))
    found = spearman(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(float(np.corrcoef(ranks(x), ranks(y))[0, 1]), abs=1e-9)
