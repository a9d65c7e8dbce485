"""How many digits a value has, and what is left of it where numbers are extreme. docs/numerics.md says it, and every
bound asserted here is read from that page's tables.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._pytree import tree_map

import inrun
from inrun import Attributor, InrunError, Ledger, NonFiniteError
from inrun.game import Game
from inrun.oracle import StepGame, exact_shapley, per_example_gradients
from tests.models import CASES, class_losses, mlp, vectors
from tests.reference import reference_direction

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
BOUNDS = {key: float(last) for key, last in re.findall(r"^\| `(.+?)` \|.*\| (\S+) \|$", PAGE.read_text(), re.MULTILINE)}

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=1e-2, weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "first": {"scheme": "first"},
    "second": {"scheme": "second"},
    "path": {},
    "path, 3 nodes": {"nodes": 3},
    "path, adaptive": {"nodes": "adaptive"},
    "credit": {"momentum": "credit"},
}


def twin(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Both once more in float64, from the same weights and the same state."""
    wide = copy.deepcopy(model).double()
    of = dict(zip(model.parameters(), wide.parameters(), strict=True))
    groups = [{**group, "params": [of[p] for p in group["params"]]} for group in optimizer.param_groups]
    kind: Any = type(optimizer)
    other: Optimizer = kind(groups)
    follow(other, optimizer)
    return wide, other


def follow(wide: Optimizer, optimizer: Optimizer) -> None:
    """Set the weights and the state of a twin to those of the other."""
    for group, wide_group in zip(optimizer.param_groups, wide.param_groups, strict=True):
        for p, wide_p in zip(group["params"], wide_group["params"], strict=True):
            wide_p.data.copy_(p.data)
            state = optimizer.state.get(p, {})
            wide.state[wide_p] = {
                k: v.double() if k != "step" else v.clone() for k, v in state.items() if v is not None
            }


def floats(batch: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, batch)


def backward(
    attributor: Attributor, optimizer: Optimizer, ids: Iterable[int], loss: Callable[[], Tensor], factor: float = 1.0
) -> None:
    """Up to the step, with the loss multiplied by `factor`."""
    optimizer.zero_grad()
    with attributor.batch(list(ids)):
        (loss() * factor).backward()


def apart(values: Tensor, others: Tensor) -> float:
    """The largest difference, relative to the largest of the others."""
    return float((values.double() - others.double()).abs().max() / others.double().abs().max())


# 1. float32 beside float64


def rounding(
    name: str, kind: str, settings: Mapping[str, Any], seed: int, folder: Path, steps: int = 6, free: bool = False
) -> list[float]:
    """By step: the largest error of a float32 value against its float64 twin's, relative to the largest |value|.

    `free`: the twin trains by itself, from the same first weights; otherwise it starts every step where the other does.
    Steps that took more nodes in one run than in the other are left out.
    """
    case, n = CASES[name], 6
    torch.manual_seed(seed)
    model = case.build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    runs = [(torch.float32, model, optimizer), (torch.float64, *twin(model, optimizer))]
    target = case.batch(4, 90)
    attributors = [
        Attributor(m, o, {"t": floats(target, d)}, case.loss, ledger=folder / str(d), **settings) for d, m, o in runs
    ]
    for step in range(steps):
        if not free:
            follow(runs[1][2], optimizer)
        for attributor, (dtype, m, o) in zip(attributors, runs, strict=True):
            batch = floats(case.batch(n, 100 * seed + step), dtype)
            backward(attributor, o, range(n * step, n * step + n), partial(case.loss, m, batch))
            o.step()
    found, nodes = [], []
    for attributor, (dtype, _, _) in zip(attributors, runs, strict=True):
        attributor.close()
        ledger = Ledger(folder / str(dtype))
        values = ledger.values("t").sort("id")["value"].to_list()
        found.append(torch.tensor(values, dtype=torch.float64).view(steps, n))
        nodes.append(ledger.steps("t")["target_gradients"].to_list())
    errors = [apart(narrow, wide) for narrow, wide in zip(*found, strict=True)]
    return [error for error, some, others in zip(errors, *nodes, strict=True) if some == others]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_float32_values_are_float64s(name: str, kind: str, settings: str, tmp_path: Path) -> None:
    first, *later = rounding(name, kind, SETTINGS[settings], 0, tmp_path)
    assert first < BOUNDS[f"float32, {kind}, first step"]
    assert len(later) >= 3
    assert max(later) < BOUNDS[f"float32, {kind}"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_float32_training_is_valued_as_float64s(kind: str, tmp_path: Path) -> None:
    """Each run trains by itself, for 40 steps."""
    errors = rounding("gpt", kind, {}, 0, tmp_path, steps=40, free=True)
    assert max(errors[1:]) < BOUNDS["float32, trained apart"]


# 2. gradients that cancel, and 3. parameters that never had one


def regression_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.as_tensor((model(batch[0]) - batch[1]).square().mean(dim=1))


def regression(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, torch.stack([x[:, 0].tanh(), x[:, 1] * x[:, 2], x[:, 3]], dim=1)


def trained(model: nn.Module, kind: str, steps: int, losses: Any, batch: Callable[[int], Any]) -> Optimizer:
    """The optimizer after these steps, the first ten of which are a warm-up, at its full rate."""
    optimizer = OPTIMIZERS[kind](model.parameters())
    rate = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10)
        optimizer.zero_grad()
        losses(model, batch(step)).mean().backward()
        optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    return optimizer


def audits(
    model: nn.Module, optimizer: Optimizer, losses: Any, batch: Any, target: Any, factor: float = 1.0
) -> tuple[Game, Game, Tensor]:
    """A step's audit in float32; in float64 from the same state; and the latter's Shapley values by the oracle. The
    batch's loss is multiplied by `factor`.

    Conservation holds in both, or the audit would raise.
    """

    def loss(m: nn.Module, b: Any) -> Tensor:
        return torch.as_tensor(losses(m, b).mean())

    n = len(losses(model, batch))
    wide, wide_optimizer = twin(model, optimizer)
    g = per_example_gradients(wide, lambda m: losses(m, floats(batch, torch.float64)) * (factor / n))
    game = StepGame(wide, wide_optimizer, g, lambda m: loss(m, floats(target, torch.float64)))
    shapley, found = exact_shapley(game, n), []
    for dtype, m, o in ((torch.float32, model, optimizer), (torch.float64, wide, wide_optimizer)):
        with Attributor(m, o, {"t": floats(target, dtype)}, loss) as attributor:
            backward(attributor, o, range(n), partial(loss, m, floats(batch, dtype)), factor)
            found.append(inrun.audit(attributor)["t"])
            o.step()
    return found[0], found[1], shapley


def distance(values: Tensor, shapley: Tensor) -> float:
    return float((values - shapley).norm() / shapley.norm())


def pairs(name: str, kind: str, steps: int, excess: float, seed: int) -> tuple[Game, Game, Tensor]:
    """Three pairs of examples whose gradients are opposite, but for a share `excess` of them, after some steps."""
    torch.manual_seed(seed)
    model = nn.Linear(6, 3) if name == "linear" else nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = trained(model, kind, steps, regression_losses, lambda step: regression(8, 1000 * seed + step))
    generator = torch.Generator().manual_seed(seed)
    x, off = torch.randn(3, 6, generator=generator), 0.3 * torch.randn(3, 3, generator=generator)
    with torch.no_grad():
        y = model(x)
    batch = torch.cat([x, x]), torch.cat([y + off, y - off * (1 + excess)])
    return audits(model, optimizer, regression_losses, batch, regression(8, 999))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_gradients_that_nearly_cancel(name: str, kind: str) -> None:
    """G is down to 1e-7 of the g_i, and in float32 nothing but rounding. The values have all their digits."""
    for excess, seed in itertools.product((1e-2, 1e-4, 1e-8, 0.0), range(3)):
        narrow, wide, shapley = pairs(name, kind, 20, excess, seed)
        assert apart(narrow.values, wide.values) < BOUNDS["cancelling, float32"]
        assert abs(float(narrow.values.sum() - wide.values.sum())) < 1e-5 * float(wide.values.abs().max())
        assert distance(narrow.values, shapley) < BOUNDS[f"cancelling, {kind}"]


def test_gradients_that_nearly_cancel_at_the_first_step_of_adam() -> None:
    """A value is g_i times a move of full length over G: far too large. The audit says so, and their sum is right."""
    for seed in range(3):
        narrow, wide, shapley = pairs("mlp", "adamw", 0, 1e-2, seed)
        assert bool(narrow.values.isfinite().all())
        assert min(narrow.relative_error, wide.relative_error) > 10
        assert distance(wide.shapley, shapley) < 1e-9
        size = float(wide.values.abs().max())
        assert abs(float(narrow.values.sum() - wide.values.sum())) < 1e-5 * size
        assert abs(float(wide.values.sum() - shapley.sum())) < 1e-4 * size


def opposite(kind: str, steps: int, seed: int) -> tuple[Game, Game, Tensor]:
    """Two examples whose gradients cancel to the last bit: one input of a linear model, and losses of either sign."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.as_tensor(batch[1] * model(batch[0]).square().mean(dim=1))

    torch.manual_seed(seed)
    model = nn.Linear(6, 3)
    optimizer = trained(model, kind, steps, regression_losses, lambda step: regression(8, 1000 * seed + step))
    x = torch.randint(0, 2, (1, 6)) * 2.0 - 1.0
    target = torch.randn(8, 6), torch.ones(8)
    return audits(model, optimizer, losses, (torch.cat([x, x]), torch.tensor([1.0, -1.0])), target)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_gradients_that_cancel_to_the_last_bit(kind: str) -> None:
    for seed in range(3):
        narrow, _, shapley = opposite(kind, 20, seed)
        assert distance(narrow.values, shapley) < BOUNDS[f"cancelling to the last bit, {kind}"]


def test_gradients_that_cancel_to_the_last_bit_at_the_first_step_of_adam() -> None:
    """The chord is not defined: values of zero, which add up to what the step did, where each alone would do much."""
    narrow, wide, shapley = opposite("adamw", 0, 0)
    assert narrow.values.tolist() == wide.values.tolist() == [0.0, 0.0]
    assert narrow.relative_error == wide.relative_error == 1.0
    assert abs(float(shapley.sum())) < 1e-9
    assert float(shapley.abs().max()) > 1e-3


class Bag(nn.Module):
    """Classes from the mean of some tokens' embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.outer = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.outer(torch.tanh(self.inner(self.embedding(x).mean(dim=1)))))


def bags(n: int, seed: int, new: int = 0) -> tuple[Tensor, Tensor]:
    """The last token, number 11, stands in the first `new` examples only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 11, (n, 6), generator=generator)
    x[:new, 2] = 11
    return x, (x.sum(dim=1) + torch.randint(0, 2, (n,), generator=generator)) % 5


def new_token(kind: str, new: int, seed: int) -> tuple[Game, Game, Tensor]:
    """`new` of six examples hold a token that the first thirty steps had not; half of the target has it too."""
    torch.manual_seed(seed)
    model = Bag()
    optimizer = trained(model, kind, 30, class_losses, lambda step: bags(6, 1000 * seed + step))
    return audits(model, optimizer, class_losses, bags(6, 5000 + seed, new), bags(8, seed, 4))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_token_seen_for_the_first_time_late_in_training(kind: str) -> None:
    for seed in range(3):
        narrow, wide, shapley = new_token(kind, 1, seed)
        assert apart(narrow.values, wide.values) < BOUNDS["new token, float32"]
        assert distance(narrow.values, shapley) < BOUNDS[f"new token, {kind}"]


def test_a_new_token_that_two_examples_share() -> None:
    """Its row moves by a sign of the two gradients' sum, of which neither has a share. The sum of values stands."""
    found = [new_token("adamw", 2, seed) for seed in range(5)]
    for narrow, _, shapley in found:
        assert abs(float(narrow.values.sum() - shapley.sum())) < 1e-4 * float(shapley.abs().sum())
    assert max(narrow.relative_error for narrow, _, _ in found) > 0.5


# 4. a rate of zero, and 5. a gradient of zero


def books(folder: Path) -> list[dict[str, Any]]:
    return list(Ledger(folder).steps("t").iter_rows(named=True))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("settings", ["path", "path, adaptive", "second", "credit"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_learning_rate_of_zero(kind: str, settings: str, tmp_path: Path) -> None:
    """Three steps at a rate of zero, and three of a warm-up after them."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    rate = optimizer.param_groups[0]["lr"]
    attributor = Attributor(
        model, optimizer, {"t": case.batch(4, 90)}, case.loss, ledger=tmp_path, audit_every=1, **SETTINGS[settings]
    )
    for step in range(6):
        optimizer.param_groups[0]["lr"] = rate * max(0, step - 2) / 3
        backward(attributor, optimizer, range(5 * step, 5 * step + 5), partial(case.loss, model, case.batch(5, step)))
        optimizer.step()
    attributor.close()
    rows, accounts = books(tmp_path), ("value", "momentum", "decay", "unexplained")
    for row in rows[:3]:
        assert [row[name] for name in accounts] == [0.0] * 4
        assert row["loss_before"] == row["loss_after"]
        assert row["target_gradients"] == (2 if settings == "second" else 1)
    for row in rows:
        drop = row["loss_before"] - row["loss_after"]
        assert drop == pytest.approx(sum(row[name] for name in accounts), abs=1e-12)
        assert abs(row["unexplained"]) <= 0.2 * abs(row["value"])
    values = Ledger(tmp_path).values("t").sort("id")["value"]
    assert values.is_finite().all()
    if settings != "credit":  # which pays the gradients of those steps when they move the weights
        assert values[:15].to_list() == [0.0] * 15
    assert float(values.sum()) == pytest.approx(sum(row["value"] for row in rows), abs=1e-12)
    assert all(value != 0 for value in values[15:].to_list())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("how", ["loss", "inputs"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_of_zero(kind: str, weight_decay: float, how: str, tmp_path: Path) -> None:
    """The first step's drop is the decay's, the fifth's is the momentum's and the decay's, to the last bit but one."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False)
    optimizer = OPTIMIZERS[kind](model.parameters())
    optimizer.param_groups[0]["weight_decay"] = weight_decay

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return class_losses(m, b).mean()

    with Attributor(model, optimizer, {"t": vectors(4, 90)}, loss, ledger=tmp_path, audit_every=1) as attributor:
        for step in range(5):
            x, y = vectors(5, step)
            factor = 0.0 if step in (0, 4) else 1.0
            of_inputs, of_loss = (factor, 1.0) if how == "inputs" else (1.0, factor)
            backward(attributor, optimizer, range(5), partial(loss, model, (x * of_inputs, y)), of_loss)
            optimizer.step()
            assert attributor.last is not None
            assert (attributor.last.values["t"].tolist() == [0.0] * 5) == (factor == 0)
    first, *_, last = books(tmp_path)
    for row in (first, last):
        assert row["value"] == 0
        assert abs(row["unexplained"]) < 1e-15
        assert row["momentum"] + row["decay"] == pytest.approx(row["loss_before"] - row["loss_after"], abs=1e-15)
        assert (row["decay"] == 0) == (weight_decay == 0)
    assert first["momentum"] == 0
    assert abs(last["momentum"]) > 1e-4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_of_zero_under_credit(kind: str, tmp_path: Path) -> None:
    """Its step moves the weights by what earlier examples left, who are paid for it; its own are paid nothing."""
    case = CASES["mlp"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    target = {"t": case.batch(4, 90)}
    with Attributor(
        model, optimizer, target, case.loss, nodes=9, momentum="credit", ledger=tmp_path, audit_every=1
    ) as attributor:
        for step in range(5):
            ids, batch = range(5 * step, 5 * step + 5), case.batch(5, step)
            backward(attributor, optimizer, ids, partial(case.loss, model, batch), 0.0 if step == 4 else 1.0)
            optimizer.step()
    last = books(tmp_path)[-1]
    assert abs(last["unexplained"]) < 0.01 * abs(last["value"])
    assert Ledger(tmp_path).values("t").sort("id")["value"][20:].to_list() == [0.0] * 5


# 6. weights of bfloat16


def half(
    kind: str, rate: float, seed: int, steps: int = 20, **settings: Any
) -> tuple[list[float], list[dict[str, Any]]]:
    """By step of a GPT whose weights are bfloat16: the largest error of a value against <g_i, q> in float64, relative
    to the largest value, with the same weights, state and g_i; and the rows of the books.
    """
    case, n = CASES["gpt"], 6
    torch.manual_seed(seed)
    model = case.build().to(torch.bfloat16)
    optimizer: Optimizer = (
        AdamW(model.parameters(), lr=rate) if kind == "adamw" else SGD(model.parameters(), lr=rate, momentum=0.9)
    )
    wide, wide_optimizer = twin(model, optimizer)
    target, errors = case.batch(4, 90), []
    with TemporaryDirectory() as folder:
        attributor = Attributor(model, optimizer, {"t": target}, case.loss, ledger=folder, audit_every=1, **settings)
        for step in range(steps):
            batch = case.batch(n, 100 * seed + step)
            g = per_example_gradients(model, case.parts(batch, n))
            backward(attributor, optimizer, range(n), partial(case.loss, model, batch))
            follow(wide_optimizer, optimizer)
            for p, wide_p in zip(model.parameters(), wide.parameters(), strict=True):
                wide_p.grad = None if p.grad is None else p.grad.double()
            q = reference_direction(wide, wide_optimizer, case.at(target), "path", 1)
            wanted = torch.stack(
                [(g[name].double() * q[p]).flatten(1).sum(1) for name, p in wide.named_parameters() if p in q]
            ).sum(dim=0)
            optimizer.step()
            assert attributor.last is not None
            errors.append(apart(attributor.last.values["t"], wanted))
        attributor.close()
        return errors, books(Path(folder))


@pytest.mark.parametrize(("kind", "rate"), [("adamw", 1e-2), ("sgd", 0.05)])
def test_weights_of_bfloat16(kind: str, rate: float) -> None:
    errors, rows = half(kind, rate, 0)
    assert max(errors) < BOUNDS["bfloat16, worst of 20 steps"]
    assert sorted(errors)[len(errors) // 2] < BOUNDS["bfloat16, median of 20 steps"]
    assert max(row["conservation"] for row in rows) < BOUNDS["bfloat16, conservation"]


def test_adaptive_nodes_under_bfloat16() -> None:
    """Its tolerance ends where the rounding of a loss begins, and here that is above what a step removes."""
    _, rows = half("adamw", 1e-2, 0, steps=5, nodes="adaptive", tolerance=1e-6)
    assert [row["target_gradients"] for row in rows] == [1] * 5
    assert all(abs(row["value"]) < 4 * torch.finfo(torch.bfloat16).eps * row["loss_before"] for row in rows)


@pytest.mark.parametrize("factor", [0.99, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_foreign_move_of_weights_of_bfloat16(dtype: torch.dtype, factor: float) -> None:
    """Found where it is more than four roundings of the weight, which is 3% in bfloat16."""
    case = CASES["gpt"]
    model = case.build().to(dtype)
    optimizer = SGD(model.parameters(), lr=0.05)
    attributor = Attributor(model, optimizer, {"t": case.batch(4, 90)}, case.loss)

    def shrink(*_: object) -> None:
        with torch.no_grad():
            next(model.parameters()).mul_(factor)

    optimizer.register_step_pre_hook(shrink)
    backward(attributor, optimizer, range(5), partial(case.loss, model, case.batch(5, 0)))
    if dtype == torch.bfloat16 and factor == 0.99:
        optimizer.step()
    else:
        with pytest.raises(InrunError, match="the optimizer moved this parameter otherwise"):
            optimizer.step()


# 7. scales


def scaled(kind: str, settings: str, factor: float, scaler: bool = False) -> Tensor:
    """The values of four steps, [step, example], whose loss is multiplied by `factor` and their gradient divided by it:
    by hand, or by torch's own gradient scaler.
    """
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=factor)
    target, found = {"t": case.batch(4, 90)}, TemporaryDirectory()
    with found as folder:
        with Attributor(model, optimizer, target, case.loss, ledger=folder, **SETTINGS[settings]) as attributor:
            for step in range(4):
                optimizer.zero_grad()
                with attributor.batch(range(6 * step, 6 * step + 6)):
                    loss = case.loss(model, case.batch(6, step))
                    (grad_scaler.scale(loss) if scaler else loss * factor).backward()
                if scaler:
                    grad_scaler.step(optimizer)
                    grad_scaler.update()
                else:
                    for p in model.parameters():
                        assert p.grad is not None
                        p.grad.div_(factor)
                    optimizer.step()
        return torch.tensor(Ledger(folder).values("t").sort("id")["value"].to_list()).view(4, 6)


@pytest.mark.parametrize("settings", ["path", "credit"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_scaled_loss(kind: str, settings: str) -> None:
    """By a power of two, as gradient scalers do, nothing changes at all."""
    plain = scaled(kind, settings, 1.0)
    assert torch.equal(scaled(kind, settings, 2.0**16, scaler=True), plain)
    assert torch.equal(scaled(kind, settings, 2.0**16), plain)
    for factor in (3e4, 1e30, 1e-30):
        again = scaled(kind, settings, factor)
        assert max(apart(*steps) for steps in zip(again[1:], plain[1:], strict=True)) < BOUNDS["scaled loss"]


def half_cancelled(kind: str, settings: str, how: str) -> Tensor:
    """The values of three examples, the first two of which cancel to the last bit where the third has no input."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.as_tensor(batch[1] * model(batch[0]).square().mean(dim=1))

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return losses(m, b).mean()

    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = trained(model, kind, 20, regression_losses, lambda step: regression(8, step))
    x = torch.ones(3, 6)
    x[2, 1:] = 0
    target = torch.randn(8, 6), torch.ones(8)
    with Attributor(model, optimizer, {"t": target}, loss, **SETTINGS[settings]) as attributor:
        batch = x, torch.tensor([1.0, -1.0, 1.0])
        backward(attributor, optimizer, range(3), partial(loss, model, batch), 2.0**16 if how == "unscaled" else 1.0)
        assert model.weight.grad is not None
        assert int((model.weight.grad == 0).sum()) == 15
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_({"unscaled": 2.0**-16, "clipped": 0.5, "as it is": 1.0}[how])
        optimizer.step()
    assert attributor.last is not None
    return attributor.last.values["t"]


@pytest.mark.parametrize(("kind", "settings"), [("sgd", "first"), ("sgd", "credit"), ("adamw", "credit")])
def test_what_cancels_is_scaled_with_the_rest(kind: str, settings: str) -> None:
    plain = half_cancelled(kind, settings, "as it is")
    assert apart(half_cancelled(kind, settings, "unscaled"), plain) < BOUNDS["scaled loss"]
    if kind == "sgd" and settings == "first":
        assert apart(half_cancelled(kind, settings, "clipped"), plain / 2) < BOUNDS["scaled loss"]


def of_size(kind: str, factor: float, seed: int) -> tuple[Game, Game]:
    """A step after twenty ordinary ones, whose gradient is multiplied by `factor`: in float32 and in float64."""
    torch.manual_seed(seed)
    model = mlp()
    optimizer = trained(model, kind, 20, class_losses, lambda step: vectors(8, 1000 * seed + step))
    return audits(model, optimizer, class_losses, vectors(6, 5000 + seed), vectors(8, 90), factor)[:2]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_gradients_that_vanish(kind: str) -> None:
    """As those of examples that are fitted: right as long as float32 has digits, then zero, and no error."""
    for factor, seed in itertools.product((1e-10, 1e-24, 1e-34, 1e-40, 1e-44), range(3)):
        narrow, wide = of_size(kind, factor, seed)
        error = float((narrow.values - wide.values).abs().max())
        assert error < BOUNDS["vanishing"] * float(wide.values.abs().max()) + 4e-44


def test_a_classifier_that_has_fitted_its_data() -> None:
    """Its gradients vanish for good, on the way through every size that a float32 has."""
    torch.manual_seed(0)
    x = torch.randn(32, 6) * 20
    y = (x[:, 0] > 0).long()
    model = nn.Linear(6, 2)
    optimizer = SGD(model.parameters(), lr=0.1)

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return class_losses(m, b).mean()

    with Attributor(model, optimizer, {"t": (x, y)}, loss) as attributor:
        for step in range(40):
            rows = torch.randint(0, 32, (4,), generator=torch.Generator().manual_seed(step))
            backward(attributor, optimizer, range(4), partial(loss, model, (x[rows], y[rows])))
            optimizer.step()
    assert attributor.last is not None
    assert float(attributor.last.values["t"].abs().max()) < 1e-9


def test_gradients_that_are_huge() -> None:
    """Under Adam the square of one is the first to overflow."""
    for seed in range(3):
        for factor in (1e10, 1e17):
            narrow, wide = of_size("adamw", factor, seed)
            assert apart(narrow.values, wide.values) < BOUNDS["huge, adamw"]
        for factor in (1e20, 1e25, 1e30, 1e36):
            with pytest.raises(NonFiniteError, match="the gradient is as large as"):
                of_size("adamw", factor, seed)


@pytest.mark.parametrize("momentum", ["account", "credit"])
@pytest.mark.parametrize("factor", [1e10, 1e20, 1e30, 1e36, 1e38])
def test_gradients_that_are_huge_under_sgd(factor: float, momentum: Any, tmp_path: Path) -> None:
    """They blow the weights up: the run stops, and all that was booked is finite."""
    case = CASES["mlp"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    attributor = Attributor(model, optimizer, {"t": case.batch(4, 90)}, case.loss, momentum=momentum, ledger=tmp_path)

    def train() -> None:
        for step in range(5):
            backward(attributor, optimizer, range(6), partial(case.loss, model, case.batch(6, step)), factor)
            optimizer.step()

    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        train()
    attributor.discard()
    attributor.close()
    assert len(books(tmp_path)) < 5
    assert Ledger(tmp_path).values("t")["value"].is_finite().all()


def test_every_bound_of_the_page_is_asserted() -> None:
    asserted = re.findall(r'BOUNDS\[f?"(.+?)"\]', Path(__file__).read_text())
    patterns = [re.sub(r"\{.*?\}", ".+", key) for key in asserted]
    assert BOUNDS
    assert [key for key in BOUNDS if not any(re.fullmatch(pattern, key) for pattern in patterns)] == []
