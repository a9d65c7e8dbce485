"""A replay in float32 against float64, coordinates that never move, and runs that are too rough."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inrun import InrunError, oracle
from inrun.replaying.passes import Hessian
from inrun.update import Moved, update_of
from tests.models import CASES
from tests.replaying.runs import OPTIMIZERS, Run, largest_difference


def exact(run: Run) -> list[Tensor]:
    """The values of the same run, from the same weights, in float64."""
    model, optimizer = run.make()
    wide = model.double()

    def doubled(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    steps = []
    for step in range(1, run.steps + 1):
        batches = [tuple(map(doubled, b)) if isinstance(b, tuple) else b for b in run.batches(step)]
        steps.append([lambda m, b=b: run.losses(m, b) for b in batches])
    given = run.target()
    target = tuple(map(doubled, given)) if isinstance(given, tuple) else given
    rates = [run.rate(step) for step in range(1, run.steps + 1)]
    loss = run.case.loss
    return oracle.replay_values(wide, optimizer, steps, lambda m: loss(m, target), clip_norm=run.clip, rates=rates)


# (With Adam's usual eps the first step is nearly a sign, and in float32 the run itself another one.)
@pytest.mark.parametrize(
    ("case", "optimizer", "hessian", "bound"),
    [
        ("mlp", "momentum", "double", 1e-5),
        ("gpt", "momentum", "double", 1e-5),
        ("gpt", "adamw, large eps", "double", 1e-4),
        ("convolutional", "adamw, large eps", "double", 1e-4),
        ("gpt", "momentum", "difference", 1e-4),
        ("gpt", "adamw, large eps", "difference", 1e-3),
    ],
)
def test_float32_is_float64_but_for_rounding(
    tmp_path: Path, case: str, optimizer: str, hessian: Hessian, bound: float
) -> None:
    run = Run(CASES[case], optimizer, 0.3, folder=tmp_path / "run", steps=8)
    run.record()
    ledger = run.replay(hessian=hessian)
    assert largest_difference(run.values(ledger), exact(run)) < bound
    if hessian == "difference":
        assert 0 < ledger.run["replays"][0]["hessian_error"] < 100 * bound


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_where_no_gradient_ever_came_nothing_moves_through_adam(name: str) -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = OPTIMIZERS[name]([p])
    state = {"step": torch.tensor(0.0), **dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), torch.zeros(3))}
    group = optimizer.param_groups[0] | {"weight_decay": 0.0}
    moved = Moved(p.detach(), torch.tensor([0.0, 1e-200, 1e-3]), state, group, update_of(optimizer))
    gradient, weight, before = moved.update.back(moved, torch.ones(1, 3), {})
    assert torch.equal(weight, torch.ones(1, 3))
    for x in (gradient, *before.values()):
        assert bool(x.isfinite().all())
        assert torch.equal(x[0, :2], torch.zeros(2))  # the second's square is zero, too
    assert float(gradient[0, 2]) != 0


@pytest.mark.usefixtures("float64")
def test_a_run_that_is_too_rough_says_so_and_names_a_horizon(tmp_path: Path) -> None:
    run = Run(replace(CASES["mlp"]), "sgd", None, steps=60, rates=(1.5,), folder=tmp_path / "run")
    run.record()
    with pytest.warns(UserWarning, match=r"grows from .* after the last step to .* Try horizon=\d+"):
        rough = run.replay()
    norms = rough.steps()["adjoint"].to_list()
    assert max(norms) > 1e3 * norms[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.replay(horizon=1)


def test_an_optimizer_without_a_way_back_is_refused_before_the_run(tmp_path: Path) -> None:
    run = Run(optimizer="rmsprop", folder=tmp_path / "run")
    with pytest.raises(InrunError, match="RMSprop: a replay goes back through the steps of SGD, Adam and AdamW"):
        run.record()
