"""The values of a replay against the slow truth: autograd through the whole run, and trainings of their own."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inrun import Attributor, InrunError, Ledger, oracle, replay
from tests.models import CASES
from tests.reference import contracted
from tests.replaying.runs import EXAMPLES, Run, largest_difference

pytestmark = pytest.mark.usefixtures("float64")


def unrolled(run: Run) -> list[torch.Tensor]:
    model, optimizer = run.make()
    steps = [
        [lambda model, batch=batch: run.losses(model, batch) for batch in run.batches(step)]
        for step in range(1, run.steps + 1)
    ]
    rates = [run.rate(step) for step in range(1, run.steps + 1)]
    target = run.target()
    return oracle.replay_values(
        model, optimizer, steps, lambda m: run.case.loss(m, target), clip_norm=run.clip, rates=rates
    )


@pytest.mark.parametrize(
    ("case", "optimizer", "clip"),
    [
        ("mlp", "sgd", None),
        ("mlp", "momentum", 0.3),
        ("mlp", "nesterov", None),
        ("mlp", "adamw", 0.5),
        ("convolutional", "sgd", 0.2),
        ("convolutional", "momentum", 0.2),
        ("convolutional", "adamw", 0.2),
        ("gpt", "sgd", 0.3),
        ("gpt", "momentum", 0.3),
        ("gpt", "adamw", 0.3),
        ("gpt", "adam", 0.3),
    ],
)
def test_a_use_is_worth_what_autograd_through_the_whole_run_says(
    tmp_path: Path, case: str, optimizer: str, clip: float | None
) -> None:
    run = Run(CASES[case], optimizer, clip, folder=tmp_path / "run")
    run.record()
    found = run.values(run.replay())
    assert largest_difference(found, unrolled(run)) < 1e-8


@pytest.mark.parametrize("case", ["mlp", "convolutional", "gpt"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_a_use_is_worth_what_trainings_without_a_part_of_it_lose(tmp_path: Path, case: str, optimizer: str) -> None:
    run = Run(CASES[case], optimizer, 0.3, folder=tmp_path / "run")
    run.record()
    found = run.values(run.replay())
    scale = max(float(x.abs().max()) for x in found)
    e = 1e-4
    for step, example in ((1, 0), (3, 1), (5, 2)):
        slope = (run.retrained(step, example, 1 + e) - run.retrained(step, example, 1 - e)) / (2 * e)
        value = float(found[step - 1][example])
        assert abs(-slope - value) < 1e-4 * max(abs(value), 1e-2 * scale)


def test_a_central_difference_is_the_double_backward_but_for_the_error_that_it_states(tmp_path: Path) -> None:
    run = Run(CASES["gpt"], "adamw", 0.3, folder=tmp_path / "run")
    run.record()
    ledger = run.replay(hessian="difference")
    assert largest_difference(run.values(ledger), unrolled(run)) < 1e-7
    told = ledger.run["replays"][0]
    assert told["hessian"] == "difference"
    assert 0 < told["hessian_error"] < 1e-7


def test_a_model_without_a_second_derivative_is_replayed_by_differences(tmp_path: Path) -> None:
    run = Run(CASES["mlp"], "adamw", 0.3, folder=tmp_path / "run")
    exact = unrolled(run)
    run.case = replace(run.case, build=lambda: nn.Sequential(CASES["mlp"].build(), OnlyOnce()))
    run.record()
    ledger = run.replay()
    assert ledger.run["replays"][0]["hessian"] == "difference"
    assert largest_difference(run.values(ledger), exact) < 1e-7


class Itself(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clone()


class OnlyOnce(nn.Module):
    """Has no second derivative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(Itself.apply(x))


def test_a_target_named_later_has_the_same_values_and_one_that_is_there_is_left(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run")
    run.record()
    both = run.replay({"t": run.target(), "later": run.target(1)})
    together = {name: run.values(both, name) for name in ("t", "later")}
    other = Run(folder=tmp_path / "other")
    other.record(targets={"something": run.target(5)})
    other.replay({"t": run.target()})
    ledger = other.replay({"t": run.target(), "later": run.target(1)})
    assert ledger.targets == ["t", "later"]
    for name, values in together.items():
        assert largest_difference(other.values(ledger, name), values) < 1e-12
    assert len(ledger.run["replays"]) == 2
    loss = other.case.loss
    other.case = replace(other.case, losses=lambda model, batch: 2 * CASES["mlp"].losses(model, batch))
    other.loss = lambda model, batch: loss(model, batch) / 2  # type: ignore[method-assign]
    with pytest.raises(InrunError, match="values for another loss of target 't'"):
        other.replay({"t": other.target()})


def test_without_a_horizon_it_is_the_value_by_the_gradient_at_the_steps_end(tmp_path: Path) -> None:
    run = Run(CASES["mlp"], "sgd", None, folder=tmp_path / "run")
    run.record()
    found = run.values(run.replay(horizon=0))
    model, optimizer = run.make()
    for step in range(1, run.steps + 1):
        parts = [partial(run.losses, batch=batch) for batch in run.batches(step)]
        g = [oracle.per_example_gradients(model, part) for part in parts]
        optimizer.param_groups[0]["lr"] = run.rate(step)
        for batch in run.batches(step):
            run.loss(model, batch).backward()
        run.step(model, optimizer, step)
        model.eval()
        gradient = torch.autograd.grad(run.case.loss(model, run.target()), list(model.parameters()))
        model.train()
        q = {p: run.rate(step) * x for p, x in zip(model.parameters(), gradient, strict=True)}
        expected = torch.cat([contracted(model, of, q) for of in g])
        assert torch.allclose(found[step - 1], expected, rtol=1e-10)


def test_a_horizon_is_the_mean_of_what_comes_after_more_and_more_steps(tmp_path: Path) -> None:
    """By its definition, from replays of the run's beginnings: a use's effect k steps later has the weight rho^k."""
    run = Run(CASES["mlp"], "adamw", 0.3, folder=tmp_path / "run")
    run.record()
    rho = 2 / 3
    found = run.values(run.replay(horizon=rho / (1 - rho)))
    ends = []
    for steps in range(1, run.steps + 1):
        shorter = Run(CASES["mlp"], "adamw", 0.3, steps=steps, folder=tmp_path / f"run-{steps}")
        ends.append(unrolled(shorter))
    for step in range(1, run.steps + 1):
        later = [(1 - rho) * rho ** (end - step) * ends[end - 1][step - 1] for end in range(step, run.steps)]
        expected = sum(later) + rho ** (run.steps - step) * ends[-1][step - 1]
        assert torch.allclose(found[step - 1], torch.as_tensor(expected), rtol=1e-8, atol=1e-14)


def test_packed_documents_and_frozen_weights(tmp_path: Path) -> None:
    run = Run(CASES["gpt"])
    model, _ = run.make()
    for name, p in model.named_parameters():
        p.requires_grad_("attn" not in name)
    batches = [run.case.batch(EXAMPLES, step) for step in range(3)]
    documents = torch.arange(EXAMPLES)[:, None].expand(EXAMPLES, 6)
    values = []
    for name, ids in (("whole", torch.arange(EXAMPLES)), ("packed", documents)):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
        with Attributor(
            trained, optimizer, {"t": run.target()}, run.case.loss, ledger=tmp_path / name, replayable=True
        ) as attributor:
            for batch in batches:
                with attributor.batch(ids, data=batch):
                    run.case.loss(trained, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        ledger = replay(tmp_path / name, {"t": run.target()}, run.case.loss, model=trained, optimizer=optimizer)
        values.append(ledger.values("t").sort("id")["value"])
        assert Ledger(tmp_path / name).schemes == ["replay"]
    assert len(values[0]) == EXAMPLES
    whole, packed = (torch.tensor(of.to_list()) for of in values)
    assert float((whole - packed).abs().max()) < 1e-9 * float(whole.abs().max())
