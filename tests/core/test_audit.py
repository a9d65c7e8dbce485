"""Audits on chosen steps and on demand: the step's real game, booked, and training left as it was."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

import inrun
from inrun import Attributor, InrunError, Ledger
from inrun.oracle import StepGame, exact_shapley, per_example_gradients
from tests.models import CASES, GPT


def optimizers_of(model: nn.Module) -> list[Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("h.")]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [Muon(matrices, lr=0.02), AdamW(rest, lr=1e-2)]


@pytest.mark.parametrize("momentum", ["account", "credit"])
def test_audits_do_not_disturb_training(momentum: Any) -> None:
    """Bit for bit: weights, optimizer states, random state and gradients of a run with dropout and without audits."""
    case = CASES["gpt"]

    def trained(audited: bool) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = GPT(dropout=0.2)
        optimizers = optimizers_of(model) if momentum == "account" else [AdamW(model.parameters(), lr=1e-2)]
        attributor = None
        if audited:
            game: dict[str, Any] = {"audit_permutations": 3} if momentum == "account" else {}
            attributor = Attributor(
                model, optimizers, {"t": case.batch(3, 9)}, case.loss, audit_every=2, momentum=momentum, **game
            )
        for step in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            if attributor is None:
                case.loss(model, case.batch(4, step)).backward()
            else:
                with attributor.batch(range(4)):
                    case.loss(model, case.batch(4, step)).backward()
                if step == 3 and momentum == "account":
                    inrun.audit(attributor, permutations=2)
            for optimizer in optimizers:
                optimizer.step()
        if attributor is not None:
            attributor.close()
        gradients = [p.grad for p in model.parameters()]
        return model.state_dict(), [o.state_dict() for o in optimizers], torch.get_rng_state(), gradients

    plain, audited = trained(False), trained(True)
    torch.testing.assert_close(audited, plain, rtol=0.0, atol=0.0)


@pytest.mark.usefixtures("float64")
def test_the_audited_steps_have_the_games_columns(tmp_path: Path) -> None:
    """Equal to the oracle's game with the real optimizer, on clipped gradients of two accumulated batches."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    target = case.batch(3, 9)
    attributor = Attributor(
        model, optimizer, {"t": target}, case.loss, ledger=tmp_path, audit_every=2, audit_permutations=10
    )
    games = {}
    for step in range(1, 4):
        optimizer.zero_grad()
        parts = [case.batch(2, 10 * step), case.batch(3, 10 * step + 1)]
        g = [per_example_gradients(model, case.parts(part, 2 * len(part))) for part in parts]
        for part in parts:
            with attributor.batch(range(len(part))):
                (case.loss(model, part) / 2).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        received = {n: torch.cat([one[n] for one in g]) * (0.05 / (norm + 1e-6)) for n in g[0]}
        game = StepGame(model, optimizer, received, case.at(target))
        games[step] = exact_shapley(game, 5)
        optimizer.step()
        if step == 2:
            assert attributor.last is not None
            values = attributor.last.values["t"]
    attributor.close()
    books = Ledger(tmp_path).steps("t")
    assert books["game_error"].is_null().to_list() == [True, False, True]
    row = books.row(1, named=True)
    assert row["game_error"] == pytest.approx(float((values - games[2]).norm() / games[2].norm()), rel=1e-6)
    assert row["game_rmse"] == pytest.approx(float((values - games[2]).square().mean().sqrt()), rel=1e-6)
    assert row["game_noise"] == 0.0
    assert row["game_spearman"] is not None


@pytest.mark.usefixtures("float64")
def test_an_audit_on_demand_is_booked_with_its_step(tmp_path: Path) -> None:
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    attributor = Attributor(model, optimizer, {"t": case.batch(3, 9)}, case.loss, ledger=tmp_path)
    with pytest.raises(InrunError, match=r"between the `batch` and its step"):
        inrun.audit(attributor)
    with attributor.batch(range(14)):
        with pytest.raises(InrunError, match=r"between the `batch` and its step"):
            inrun.audit(attributor)
        case.loss(model, case.batch(14, 0)).backward()
    with pytest.raises(InrunError, match=r"permutations=1\): give two"):
        inrun.audit(attributor, permutations=1)
    before = copy.deepcopy(model.state_dict())
    game = inrun.audit(attributor, permutations=30)["t"]
    again = inrun.audit(attributor, permutations=30, seed=1)["t"]
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert attributor.last is None
    assert (game.exact, game.permutations) == (False, 30)
    assert not torch.equal(game.shapley, again.shapley)
    assert bool(((game.shapley - again.shapley).abs() <= 6 * (game.noise + again.noise)).all())
    optimizer.step()
    assert attributor.last is not None
    torch.testing.assert_close(game.values, attributor.last.values["t"])
    optimizer.zero_grad()
    with attributor.batch(range(14)):
        case.loss(model, case.batch(14, 1)).backward()
    optimizer.step()
    attributor.close()
    books = Ledger(tmp_path).steps("t")
    assert books["game_error"][0] == pytest.approx(again.relative_error)  # the later of the two
    assert books["game_noise"][0] > 0
    assert books["game_error"][1] is None
