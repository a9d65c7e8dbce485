"""Every displacement against the torch optimizer's real step; every chord against the quotient that defines it, every
other pull-back against differences of moves, and all of them against the Shapley values of a small game.
"""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from inrun import InrunError
from inrun.direction import Path
from inrun.oracle import StepGame, exact_shapley, per_example_gradients
from inrun.parallel import Processes
from inrun.target import Evaluation, Target
from inrun.update import CoupledUpdate, Moved, check_move, supported_optimizers, update_of
from tests.models import CASES
from tests.reference import real_move

Muon: type[Optimizer] | None = getattr(torch.optim, "Muon", None)  # from torch 2.9 on

rates = st.floats(1e-4, 0.5)
flags = st.booleans()
Strategy = st.SearchStrategy[Any]
decay: dict[str, Strategy] = {"weight_decay": st.sampled_from([0.0, 0.01, 0.3])}
decoupled: dict[str, Strategy] = {**decay, "decoupled_weight_decay": flags}
moments: dict[str, Strategy] = {
    "betas": st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.5, 0.5)]),
    "eps": st.sampled_from([1e-8, 1e-3]),
}
HOW = ("single", "foreach", "rate as a tensor")
FUSED = (*HOW, "fused")


def drawn(how: tuple[str, ...], /, **more: Strategy) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"lr": rates, "how": st.sampled_from(how), **more})


def nesterov(given: dict[str, Any]) -> dict[str, Any]:
    """torch takes Nesterov's momentum only undampened."""
    return given | {"nesterov": given["nesterov"] and given["momentum"] > 0 and given["dampening"] == 0}


OPTIONS: dict[type[Optimizer], st.SearchStrategy[dict[str, Any]]] = {
    SGD: drawn(
        FUSED, momentum=st.sampled_from([0.0, 0.5, 0.9]), dampening=st.sampled_from([0.0, 0.4]), nesterov=flags,
        maximize=flags, **decay,
    ).map(nesterov),
    Adam: drawn(FUSED, amsgrad=flags, maximize=flags, **moments, **decay),
    AdamW: drawn(FUSED, amsgrad=flags, maximize=flags, **moments, **decay),
    NAdam: drawn(HOW, momentum_decay=st.sampled_from([0.0, 4e-3, 0.5]), maximize=flags, **moments, **decoupled),
    RAdam: drawn(HOW, maximize=flags, **moments, **decoupled),
    Adamax: drawn(HOW, maximize=flags, **moments, **decay),
    Adagrad: drawn(
        FUSED, lr_decay=st.sampled_from([0.0, 0.1]), initial_accumulator_value=st.sampled_from([0.0, 0.1]),
        eps=st.sampled_from([1e-10, 1e-3]), maximize=flags, **decay,
    ),
    Adadelta: drawn(HOW, rho=st.sampled_from([0.5, 0.9]), eps=st.sampled_from([1e-6, 1e-2]), maximize=flags, **decay),
    RMSprop: drawn(
        HOW, alpha=st.sampled_from([0.5, 0.99]), eps=st.sampled_from([1e-8, 1e-3]), centered=flags,
        momentum=st.sampled_from([0.0, 0.9]), maximize=flags, **decay,
    ),
    Rprop: drawn(
        HOW, etas=st.sampled_from([(0.5, 1.2), (0.3, 3.0)]), step_sizes=st.sampled_from([(1e-6, 50.0), (0.01, 0.1)]),
        maximize=flags,
    ),
    ASGD: drawn(
        HOW, lambd=st.sampled_from([0.0, 1e-4, 0.1]), alpha=st.sampled_from([0.5, 0.75]),
        t0=st.sampled_from([3.0, 1e6]), maximize=flags, **decay,
    ),
    Adafactor: drawn(
        HOW, beta2_decay=st.sampled_from([-0.8, -0.3]), eps=st.sampled_from([(None, 1e-3), (1e-2, 0.1)]),
        d=st.sampled_from([1.0, 3.0]), maximize=flags, **decay,
    ),
}  # fmt: skip
if Muon is not None:
    OPTIONS[Muon] = drawn(
        ("single", "rate as a tensor"), momentum=st.sampled_from([0.0, 0.5, 0.95]), nesterov=flags,
        ns_steps=st.sampled_from([1, 5]), adjust_lr_fn=st.sampled_from([None, "original", "match_rms_adamw"]), **decay,
    )  # fmt: skip

EVERY = pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
COUPLED = [kind for kind in (Adafactor, Muon) if kind is not None]
ELEMENTWISE = pytest.mark.parametrize(
    "kind", [kind for kind in OPTIONS if kind not in COUPLED], ids=lambda kind: kind.__name__
)


def shapes(kind: type[Optimizer]) -> list[tuple[int, ...]]:
    if kind is Muon:
        return [(4, 4), (3, 6), (6, 3), (1, 5), (0, 3)]
    some: list[tuple[int, ...]] = [(), (9,), (3, 4), (2, 3, 4), (2, 1, 3, 2)]
    return some if kind is Adafactor else [*some, (0, 3)]  # torch's Adafactor divides by the size of a parameter


class Run:
    """An optimizer over parameters of several shapes, whose gradients are of every size, some zero."""

    def __init__(self, kind: type[Optimizer], options: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
        self._generator, self._dtype = torch.Generator().manual_seed(seed), dtype
        self.parameters = [nn.Parameter(self._randn(shape).to(dtype)) for shape in shapes(kind)]
        self.optimizer = kind(self.parameters, **options)

    def _randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def draw(self, size: float = 1.0) -> None:
        """New gradients: a tenth of the entries zero, the others of sizes from 1e-4 to 100."""
        for p in self.parameters:
            shape = tuple(p.shape)
            exponents = torch.randint(-4, 3, shape, generator=self._generator)
            there = torch.rand(shape, generator=self._generator) > 0.1
            p.grad = (size * self._randn(shape) * 10.0**exponents * there).to(self._dtype)

    def moved(self, p: nn.Parameter) -> Moved:
        assert p.grad is not None
        group = self.optimizer.param_groups[0]
        return Moved(p.detach(), p.grad, self.optimizer.state.get(p, {}), group, update_of(self.optimizer))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Weights, gradients and state are not written to inside the block."""
        held = [*self.parameters, *(p.grad for p in self.parameters if p.grad is not None)]
        held += [x for of in self.optimizer.state.values() for x in of.values() if isinstance(x, Tensor)]
        versions, size = [x._version for x in held], len(self.optimizer.state)
        yield
        assert [x._version for x in held] == versions
        assert len(self.optimizer.state) == size

    @contextmanager
    def without_decay(self) -> Iterator[None]:
        (group,) = self.optimizer.param_groups
        kept = {key: value for key, value in group.items() if key in ("weight_decay", "lambd")}
        group.update(dict.fromkeys(kept, 0.0))
        yield
        group.update(kept)


def as_torch_takes(given: dict[str, Any], rate_dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The options with `how` in torch's words."""
    how = given.pop("how")
    if how == "rate as a tensor":
        return given | {"lr": torch.tensor(given["lr"], dtype=rate_dtype)}
    return given if how == "single" else given | {how: True}


def check(run: Run, rtol: float = 1e-9, rounding: float = 1e-14, steps: int = 8) -> None:
    """The move at three points of the path, without decay too, and what chords and pull-backs say of it."""
    for step in range(steps):
        run.draw()
        moves = [run.moved(p) for p in run.parameters]
        points = (0.0, 0.25, 1.0)
        with run.unchanged():
            found = {s: [moved.update.displacement(moved, s) for moved in moves] for s in points}
            calm = [moved.update.displacement(moved, 0.25, decay=False) for moved in moves]
            start = points[step % 2]
            back = [x - y for x, y in zip(found[start], found[1.0], strict=True)]
            check_credit(moves, start, back, max(1e-7, rtol))
        if step % 4 == 1:
            with run.without_decay():
                close(calm, real_move(run.optimizer, 0.25), rtol, rounding)
        real = {s: real_move(run.optimizer, s) for s in points[:2]}
        before = {p: p.detach().clone() for p in run.parameters}
        run.optimizer.step()
        real[1.0] = {p: p.detach() - before[p] for p in run.parameters}
        for s in points:
            close(found[s], real[s], rtol, rounding)


def close(found: list[Tensor], real: dict[nn.Parameter, Tensor], rtol: float, rounding: float) -> None:
    """Equal but for the rounding of weights and moves."""
    size = 1 + float(flat([*real, *real.values()]).abs().max())
    torch.testing.assert_close(flat(found), flat(real.values()), rtol=rtol, atol=rounding * size)
    assert [x.shape for x in found] == [x.shape for x in real.values()]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def check_credit(moves: list[Moved], start: float, back: list[Tensor], rtol: float) -> None:
    """The gradient earns the move, `back` from 1 to `start`: coordinate by coordinate or, if coupled, as a whole."""
    legs = [moved.update.pull_back(moved, start, 1.0) for moved in moves]
    torch.testing.assert_close(flat(way for way, _ in legs), flat(back), rtol=rtol, atol=1e-12)
    if not isinstance(moves[0].update, CoupledUpdate):
        earned = [
            pull(torch.ones_like(moved.weight)) * moved.gradient for (_, pull), moved in zip(legs, moves, strict=True)
        ]
        torch.testing.assert_close(flat(earned), flat(back), rtol=rtol, atol=1e-12)
        return
    for moved, (way, pull) in zip(moves, legs, strict=True):
        towards = torch.randn(way.shape, dtype=way.dtype, generator=torch.Generator().manual_seed(0))
        q = pull(towards)
        size = float(torch.sum((towards * way).abs()) + torch.sum((moved.gradient * q).abs()))
        assert abs(float(torch.sum(moved.gradient * q) - torch.sum(towards * way))) <= 1e-12 * size + 1e-14


@EVERY
@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_the_displacement_is_the_real_move(kind: type[Optimizer], data: st.DataObject, seed: int) -> None:
    run = Run(kind, as_torch_takes(data.draw(OPTIONS[kind])), seed, torch.float64)
    check(run)


@pytest.mark.usefixtures("float64")
@EVERY
def test_the_state_may_keep_single_numbers_in_float64(kind: type[Optimizer]) -> None:
    """As torch's optimizers do where that is the default dtype."""
    check(Run(kind, {"lr": 0.03}, 0, torch.float64))


@EVERY
def test_a_rate_that_is_a_tensor_in_float32(kind: type[Optimizer]) -> None:
    """torch then scales float64 weights by 1 - lr * weight_decay in float32, which rounds by 6e-8 of the weight."""
    options = {"lr": torch.tensor([0.03])} | ({} if kind is Rprop else {"weight_decay": 0.1})
    check(Run(kind, options, 0, torch.float64), rtol=1e-6, rounding=1e-7)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, RMSprop, Rprop, ASGD])
def test_capturable(kind: type[Optimizer], foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch then computes rates and bias corrections in float32, of which 1 - 0.999^t loses two digits.

    It refuses to on a CPU, though nothing in the step needs another device.
    """
    home = importlib.import_module(kind.__module__ if kind is not AdamW else "torch.optim.adam")
    monkeypatch.setattr(home, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])
    options = {"lr": 0.01, "capturable": True, "foreach": foreach}
    check(Run(kind, options, 0, torch.float64), rtol=2e-5, rounding=1e-7, steps=16)


@ELEMENTWISE
@pytest.mark.parametrize("decay", [True, False])
def test_many_gradients_at_once(kind: type[Optimizer], decay: bool) -> None:
    """A gradient of one more dimension in front gives the moves of all its rows: at the first step, and later."""
    run = Run(kind, {"lr": 0.03} | ({} if kind is Rprop else {"weight_decay": 0.1}), 0, torch.float64)
    for _ in range(3):
        run.draw()
        for moved in (run.moved(p) for p in run.parameters):
            rows = torch.stack([moved.gradient, -moved.gradient, 0 * moved.gradient, 3 * moved.gradient])
            together = moved.update.displacement(replace(moved, gradient=rows), 0.5, decay=decay)
            alone = [moved.update.displacement(replace(moved, gradient=row), 0.5, decay=decay) for row in rows]
            torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=0.0)
            chords = moved.update.chord(replace(moved, gradient=rows), 0.0, 1.0)
            alone = [moved.update.chord(replace(moved, gradient=row), 0.0, 1.0) for row in rows]
            torch.testing.assert_close(chords, torch.stack(alone), rtol=1e-12, atol=0.0)
        run.optimizer.step()


@ELEMENTWISE
@settings(max_examples=10, deadline=None)
@given(decay=st.sampled_from([0.0, 0.01]), amsgrad=flags, seed=st.integers(0, 2**16))
def test_the_chord_does_not_cancel_where_the_gradient_is_tiny(
    kind: type[Optimizer], decay: float, amsgrad: bool, seed: int
) -> None:
    """In float32 the quotient of two moves is noise for a gradient of 1e-9; the chord must equal the one in float64.

    Quotients in float64 keep 16 digits less the 9 of the gradient and the few that randn is below 1.
    """
    options: dict[str, Any] = {"lr": 1e-2} | ({} if kind is Rprop else {"weight_decay": decay})
    if kind in (Adam, AdamW):
        options["amsgrad"] = amsgrad
    generator = torch.Generator().manual_seed(seed)
    weight, *gradients = (torch.randn(30, generator=generator) for _ in range(7))
    chords = {}
    for dtype in (torch.float64, torch.float32):
        p = nn.Parameter(weight.to(dtype, copy=True))
        optimizer = kind([p], **options)
        for gradient in gradients[1:]:
            p.grad = gradient.to(dtype)
            optimizer.step()
        p.grad = 1e-9 * gradients[0].to(dtype).sign() * (0.1 + gradients[0].to(dtype).abs())
        moved = Moved(p.detach(), p.grad, optimizer.state[p], optimizer.param_groups[0], update_of(optimizer))
        chords[dtype] = moved.update.chord(moved, 0.0, 1.0).double()
    torch.testing.assert_close(chords[torch.float32], chords[torch.float64], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("kind", COUPLED, ids=lambda kind: kind.__name__)
@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_a_pull_back_is_the_derivative(kind: type[Optimizer], data: st.DataObject, seed: int) -> None:
    """Across G, of what is smooth: over a short piece [a, b], <q, v> = -(b - a) <gradient, dD(sG + v) / dv>."""
    options = as_torch_takes(data.draw(OPTIONS[kind]))
    if kind is Adafactor:
        options["eps"] = (1e-3, 1e-3)  # where all gradients were zero, differences cannot see a slope of 1 / eps
    run = Run(kind, options, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    short = 0.5, 0.5 + 1e-8  # hardly ever with a kink in it
    for _ in range(3):
        run.draw()
        for moved in (run.moved(p) for p in run.parameters if p.numel() > 1):
            towards, v = torch.randn(2, *moved.weight.shape, dtype=torch.float64, generator=generator)
            v -= moved.gradient * (torch.sum(v * moved.gradient) / moved.gradient.square().sum())
            v *= 1e-8 * moved.gradient.norm() / v.norm()
            update = moved.update
            assert isinstance(update, CoupledUpdate)
            ahead, behind = (
                update.smooth(replace(moved, gradient=moved.gradient * (0.5 + 5e-9) + way * v), 1.0) for way in (1, -1)
            )
            with run.unchanged():
                q = update.pull_back(moved, *short)[1](towards)
            turned = (behind - ahead) / 2 * 1e-8
            allowed = 1e-3 * float(towards.norm() * turned.norm()) + 1e-20
            assert abs(float(torch.sum(q * v) - torch.sum(towards * turned))) <= allowed
        run.optimizer.step()


@pytest.mark.parametrize("kind", COUPLED, ids=lambda kind: kind.__name__)
def test_a_pull_back_is_used_while_the_weights_are_displaced(kind: type[Optimizer]) -> None:
    run = Run(kind, {"lr": 0.01}, 0, torch.float64)
    run.draw()
    pulls = [moved.update.pull_back(moved, 0.0, 1.0)[1] for moved in map(run.moved, run.parameters)]
    before = [pull(torch.ones_like(p)) for pull, p in zip(pulls, run.parameters, strict=True)]
    with torch.no_grad():
        for p in run.parameters:
            p.mul_(3)
    after = [pull(torch.ones_like(p)) for pull, p in zip(pulls, run.parameters, strict=True)]
    assert torch.equal(flat(before), flat(after))


@pytest.mark.parametrize("kind", COUPLED, ids=lambda kind: kind.__name__)
def test_a_pull_back_in_lower_precision(kind: type[Optimizer]) -> None:
    """In float32, and in bfloat16, where the derivative is computed in float64: q against all of it in float64."""
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        found = {}
        for exact in (False, True):
            options = {"lr": 0.01} | ({"eps": (1e-6, 1e-3)} if kind is Adafactor else {})
            run = Run(kind, options, 0, dtype)
            for _ in range(3):
                run.draw()
                run.optimizer.step()
            run.draw()
            moves = [moved.double() if exact else moved for moved in map(run.moved, run.parameters)]
            towards = [torch.ones_like(moved.weight) for moved in moves]
            pulls = [moved.update.pull_back(moved, 0.0, 1.0)[1] for moved in moves]
            found[exact] = flat(pull(x).double() for pull, x in zip(pulls, towards, strict=True))
        assert (found[False] - found[True]).norm() <= most * found[True].norm()


@pytest.mark.skipif(Muon is None, reason="torch has no Muon before 2.9")
def test_muons_smooth_move_is_its_real_one_but_for_bfloat16() -> None:
    assert Muon is not None
    run = Run(Muon, {"lr": 0.1, "weight_decay": 0.0}, 0, torch.float64)
    for _ in range(5):
        run.draw()
        for moved in (run.moved(p) for p in run.parameters):
            assert isinstance(moved.update, CoupledUpdate)
            real, smooth = moved.update.displacement(moved, 1.0), moved.update.smooth(moved, 1.0)
            assert (real - smooth).norm() <= 0.05 * real.norm()
        run.optimizer.step()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_guard_of_a_run_lets_every_real_step_through(kind: type[Optimizer], dtype: torch.dtype) -> None:
    """Of weights in float32 and bfloat16 too; and none of what the optimizer holds is written to."""
    run = Run(kind, {"lr": 0.01} | ({"nesterov": False} if kind is Muon else {}), 0, dtype)
    for _ in range(8):
        run.draw()
        with run.unchanged():
            expected = {p: update_of(run.optimizer).displacement(run.moved(p), 1.0) for p in run.parameters}
        before = {p: p.detach().clone() for p in run.parameters}
        run.optimizer.step()
        for p in run.parameters:
            check_move("p", before[p], p.detach(), expected[p])


def test_plain_sgds_chord_is_exactly_the_learning_rate() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1e-30, 0.0, 5.0])
    optimizer = SGD([p], lr=0.07)
    moved = Moved(p.detach(), p.grad, optimizer.state[p], optimizer.param_groups[0], update_of(optimizer))
    assert torch.equal(update_of(optimizer).chord(moved, 0.0, 1.0), torch.full((3,), 0.07))


@EVERY
def test_momentum_and_decay_are_told_apart(kind: type[Optimizer]) -> None:
    """Without decay, D(0) is what momentum alone does: nothing at all at the first step."""
    shape = (2, 3) if kind is Muon else (3,)
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    options: dict[str, Any] = {"lr": 0.1} | ({} if kind is Rprop else {"weight_decay": 0.5})
    optimizer = kind([p], **options)
    moved = Moved(p.detach(), p.grad, optimizer.state.get(p, {}), optimizer.param_groups[0], update_of(optimizer))
    assert torch.equal(moved.update.displacement(moved, 0.0, decay=False), torch.zeros(shape))
    assert bool((moved.update.displacement(moved, 0.0) < 0).all()) == (kind is not Rprop)


RATES: dict[type[Optimizer], float] = {SGD: 0.03, Adagrad: 0.03, Adadelta: 1.0, ASGD: 0.03, Adafactor: 0.03}
# about twice what was measured, and 0.025 for the others; no linear share of a sign is close to its game
MOST: dict[type[Optimizer] | None, float] = {Adadelta: 0.05, Adafactor: 0.08, Muon: 0.6, Rprop: 10.0}


def error_in_a_game(kind: type[Optimizer], nodes: int, seed: int) -> float:
    """|values - Shapley values| / |Shapley values| at the 21st step of a small network, of 6 examples."""
    case = CASES["mlp"]
    torch.manual_seed(seed)
    model = case.build()
    names = {p: name for name, p in model.named_parameters() if kind is not Muon or p.ndim == 2}
    options: dict[str, Any] = {"lr": RATES.get(kind, 3e-3)}
    optimizer = kind(list(names), **options)
    for step in range(20):
        optimizer.zero_grad()
        case.loss(model, case.batch(6, 100 * seed + step)).backward()
        optimizer.step()
    batch, target = case.batch(6, 100 * seed + 20), case.at(case.batch(30, 100 * seed + 21))
    g = {name: x for name, x in per_example_gradients(model, case.parts(batch, 6)).items() if name in names.values()}
    shapley = exact_shapley(StepGame(model, optimizer, g, target), 6)
    (group,), update = optimizer.param_groups, update_of(optimizer)
    moves = {p: Moved(p.detach(), g[name].sum(dim=0), optimizer.state[p], group, update) for p, name in names.items()}
    values = torch.zeros(6)
    found = Path(nodes, [(0.5, 1.0)]).directions(
        [Target("t", [0], lambda m, _: target(m), Evaluation(Processes(model, alone=True)))], 0, moves
    )
    for p in found["t"].vectors:
        values += (g[names[p]] * found["t"].q(p)).flatten(1).sum(dim=1)
    return float((values - shapley).norm() / shapley.norm())


@pytest.mark.usefixtures("float64")
@EVERY
def test_values_are_close_to_the_steps_game(kind: type[Optimizer]) -> None:
    """With one node, the median of three small networks."""
    errors = sorted(error_in_a_game(kind, 1, seed) for seed in range(3))
    assert errors[1] <= MOST.get(kind, 0.025)


def test_an_unknown_optimizer_is_refused_with_a_way_out() -> None:
    class MyAdam(Adam):
        """A subclass may move otherwise, so it is not taken for its parent."""

    assert supported_optimizers() == sorted(kind.__name__ for kind in OPTIONS)
    for optimizer in (LBFGS([torch.ones(1)]), SparseAdam([torch.ones(1)]), MyAdam([torch.ones(1)])):
        with pytest.raises(InrunError, match=r"not supported. Supported.*ASGD, .*To add one.*docs/optimizers.md"):
            update_of(optimizer)


def test_a_differentiable_step_is_refused() -> None:
    with pytest.raises(InrunError, match=r"differentiable=True"):
        update_of(NAdam([torch.ones(1)], differentiable=True))
