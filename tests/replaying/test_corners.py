"""Models, data and settings out of the ordinary, each replayed and held against a training of its own."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from inrun import InrunError, RecordingError, replay
from inrun.replaying import walk
from inrun.update import Moved, SGDUpdate
from tests.models import CASES
from tests.replaying import runs
from tests.replaying.runs import EXAMPLES, Run, largest_difference
from tests.replaying.test_values import unrolled

pytestmark = pytest.mark.usefixtures("float64")


class Scaled(nn.Module):
    """Another model's output times a parameter that is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.by = CASES["mlp"].build(), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.model(x) * self.by)


class Counting(nn.Module):
    """Every forward pass in training finds another buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CASES["mlp"].build()
        self.by: torch.Tensor
        self.register_buffer("by", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x) * self.by.clone()
        if self.training:
            self.by.mul_(1.3)
        return torch.as_tensor(y)


class Reentrant(nn.Module):
    """Has no second derivative, and no gradient but by backward()."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.after = CASES["mlp"].build(), nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model(x)
        return torch.as_tensor(checkpoint(self.after, x, use_reentrant=True) if self.training else self.after(x))


class Aside(torch.autograd.Function):
    """Runs a module again in the backward pass, whose weights' gradients come by a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ctx.module, ctx.x = module, x.detach()
        with torch.no_grad():
            return torch.as_tensor(module(x))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(gradient)
        return None, x.grad


class Unseen(nn.Module):
    """Has weights that no graph leads to, and whose gradient is a small part of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.after = CASES["mlp"].build(), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x)
        if not self.training:
            return torch.as_tensor(y + 1e-8 * self.after(y))
        return torch.as_tensor(y + 1e-8 * Aside.apply(self.after, y))


class Turning(nn.Module):
    """A ReLU at its kink, which turns with the rounding of attention's plain form, in the first batch of step 2."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.at = CASES["mlp"].build(), CASES["mlp"].batch(EXAMPLES, 20)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x)
        if torch.equal(x, self.at):
            rounding = -1e-12 if torch.backends.cuda.flash_sdp_enabled() else 1e-12
            y = y + torch.relu(y - y.detach() + rounding)
        return torch.as_tensor(y)


def channels_last() -> nn.Module:
    model = CASES["convolutional"].build()
    for p in model.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def normed() -> nn.Module:
    first, *rest = CASES["mlp"].build().children()
    return nn.Sequential(weight_norm(first), *rest)


def close_to_retraining(run: Run, **settings: Any) -> None:
    """One use's value is what a training with another weight of it loses."""
    run.record()
    found = run.values(run.replay(**settings))
    e = 1e-4
    slope = (run.retrained(1, 0, 1 + e) - run.retrained(1, 0, 1 - e)) / (2 * e)
    assert abs(-slope - float(found[0][0])) < 1e-5 * max(float(x.abs().max()) for x in found)


@pytest.mark.parametrize(
    ("case", "build"),
    [
        ("mlp", Scaled),
        ("mlp", Counting),
        ("mlp", Reentrant),
        ("mlp", normed),
        ("convolutional", channels_last),
    ],
)
def test_models_out_of_the_ordinary(tmp_path: Path, case: str, build: Any) -> None:
    run = Run(replace(CASES[case], build=build), "momentum", 0.3, steps=3, folder=tmp_path / "run")
    close_to_retraining(run)


def test_a_model_that_counts_its_passes_is_replayed_by_differences_too(tmp_path: Path) -> None:
    run = Run(replace(CASES["mlp"], build=Counting), "momentum", 0.3, steps=3, folder=tmp_path / "run")
    close_to_retraining(run, hessian="difference")


def test_a_step_whose_plain_gradient_is_another_is_gone_back_through_by_differences(tmp_path: Path) -> None:
    run = Run(replace(CASES["mlp"], build=Turning), "momentum", 0.3, steps=3, folder=tmp_path / "run")
    close_to_retraining(run)
    ledger = run.replay()
    assert ledger.run["replays"][0]["hessian"] == "double"
    errors = ledger.steps().sort("step")["hessian_error"]
    assert errors.is_null().to_list() == [True, False, True]
    with pytest.raises(InrunError, match=r"step 2: the gradient that torch's plain kernels make.*is not the run's"):
        run.replay({"other": run.target(1)}, hessian="double")


def test_a_double_backward_is_of_all_weights_however_small_their_gradient(tmp_path: Path) -> None:
    run = Run(replace(CASES["mlp"], build=Unseen), "momentum", 0.3, steps=3, folder=tmp_path / "run")
    run.record()
    assert run.replay().run["replays"][0]["hessian"] == "difference"


def test_betas_may_be_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": parameters, "betas": [0.8, 0.9]}], lr=1e-2)

    monkeypatch.setitem(runs.OPTIMIZERS, "adamw", listed)
    close_to_retraining(Run(steps=3, folder=tmp_path / "run"))


def test_a_momentum_of_zero_leaves_what_later_steps_owe_to_the_buffer() -> None:
    group = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "maximize": False}
    w, buffer = torch.randn(3), torch.randn(2, 3)
    moved = Moved(w, w, {"momentum_buffer": w}, group, SGDUpdate())
    gradient, _, before = moved.update.back(moved, torch.ones(2, 3), {"momentum_buffer": buffer})
    assert torch.equal(before["momentum_buffer"], buffer)
    assert torch.allclose(gradient, torch.full((2, 3), -0.1))


def taking(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss that takes its batch apart, and writes to it."""
    y = batch.pop("y")
    return cross_entropy(model(batch["x"].mul_(1.5)), y, reduction="none")


@pytest.mark.parametrize("hessian", ["double", "difference"])
def test_a_loss_may_use_its_batch_up_and_the_batch_any_layout(tmp_path: Path, hessian: str) -> None:
    def batch(n: int, seed: int) -> Any:
        x, y = CASES["mlp"].batch(n, seed)
        return {"x": x.t().contiguous().t(), "y": y}

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return taking(model, dict(batch, x=batch["x"].clone()))

    run = Run(replace(CASES["mlp"], batch=batch, losses=loss), "momentum", 0.3, steps=3, folder=tmp_path / "run")
    run.losses = lambda model, batch: taking(model, batch) / 8  # type: ignore[method-assign]
    close_to_retraining(run, hessian=hessian)


def stopped(run: Run) -> None:
    """A replay that breaks off with its last step."""

    def stop(done: float, steps: int, loss: float | None) -> None:
        if done >= run.steps - 1:
            raise KeyboardInterrupt

    model, optimizer = run.make()
    with pytest.raises(KeyboardInterrupt):
        replay(
            run.folder,
            {"t": run.target()},
            run.case.loss,
            model=model,
            optimizer=optimizer,
            train_loss=run.loss,
            progress=stop,
        )


def test_values_by_an_end_that_the_run_has_no_more_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_SAVE_EVERY", 0.0)
    run = Run(folder=tmp_path / "run", steps=4)
    run.record(until=3)
    run.replay({"early": run.target()})
    run.record(resume=True)
    with pytest.raises(InrunError, match=r"replay has values by the run's end after step 3; .* to step 4"):
        run.replay({"early": run.target()})
    shutil.rmtree(run.folder / "schemes")
    stopped(run)
    run.rates = (0.1, 0.2, 0.3, 0.6)  # of another fourth step
    run.record(resume=True)
    assert largest_difference(run.values(run.replay()), unrolled(run)) < 1e-8


def test_one_target_is_replayed_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", steps=2)
    run.record()
    model, optimizer = run.make()

    def at_once(done: float, steps: int, loss: float | None) -> None:
        with pytest.raises(InrunError, match="another process replays this run"):
            run.replay()

    target = {"t": run.target()}
    replay(run.folder, target, run.case.loss, model=model, optimizer=optimizer, train_loss=run.loss, progress=at_once)
    assert len(run.values(run.replay())) == 2


def test_weights_that_are_others_when_it_closes_are_not_the_runs_end(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", steps=3)
    whole = Run(folder=tmp_path / "whole", steps=3)
    whole.record()

    def spoil(step: int, model: nn.Module) -> None:
        if step == 3:
            model.load_state_dict(run.make()[0].state_dict())

    run.wrong = spoil
    run.record()
    run.wrong = whole.wrong
    assert largest_difference(run.values(run.replay()), whole.values(whole.replay())) == 0


def test_a_recording_that_misses_a_step_stops_the_run(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", steps=3)
    run.record(until=1)
    (run.folder / "run.json").unlink()
    for kind in ("values", "steps"):
        shutil.rmtree(run.folder / kind)
    with pytest.raises(RecordingError, match=r"ends with step 1, and this is step 1.*in another folder"):
        run.record()


@pytest.mark.parametrize("hessian", ["double", "difference"])
def test_weights_that_rest_for_a_step(tmp_path: Path, hessian: str) -> None:
    """One without a gradient, and one with a gradient of zero, which momentum moves."""

    def rest(step: int, model: nn.Module) -> None:
        still, drifting, *_ = model.parameters()
        for p in (still, drifting):
            p.requires_grad_(step != 1)
        drifting.grad = torch.zeros_like(drifting)

    run = Run(optimizer="momentum", steps=3, folder=tmp_path / "run", wrong=rest)
    close_to_retraining(run, hessian=hessian)


def test_a_recording_that_lost_its_last_steps_says_so(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", steps=3)
    run.record()
    path = run.folder / "recording" / "tensors.bin"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="ends with step 2, and has a checkpoint after step 3"):
        assert run.replay().steps()["step"].max() == 2
