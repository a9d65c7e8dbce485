"""Every scheme's q against an independent one; adaptive nodes against their measure; several optimizers at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from inrun import Attributor, InrunError, Ledger
from inrun.direction import gauss_nodes
from inrun.oracle import per_example_gradients
from inrun.update import Moved, update_of
from tests.models import CASES, GPT, Case
from tests.reference import contracted, real_move


def stepped(
    case: Case, kind: Any, seed: int = 0, **settings: Any
) -> tuple[nn.Module, Optimizer, dict[str, Tensor], Attributor]:
    """A model after three steps and the backward pass of a fourth, with the examples' gradients."""
    torch.manual_seed(seed)
    model = case.build()
    optimizer = kind(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        case.loss(model, case.batch(5, step)).backward()
        optimizer.step()
    optimizer.zero_grad()
    batch = case.batch(5, 7)
    g = per_example_gradients(model, case.parts(batch, 5))
    attributor = Attributor(model, optimizer, {"t": case.batch(4, 90)}, case.loss, **settings)
    with attributor.batch(range(5)):
        case.loss(model, batch).backward()
    return model, optimizer, g, attributor


def values_of(attributor: Attributor) -> Tensor:
    for optimizer in attributor.optimizers:
        optimizer.step()
    attributor.close()
    assert attributor.last is not None
    return attributor.last.values["t"]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def hessian_times(loss: Tensor, parameters: list[nn.Parameter], towards: list[Tensor]) -> list[Tensor]:
    """H v by a column at a time: every second derivative on its own, no double backward through a product."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    v = torch.cat([t.flatten() for t in towards])
    rows = []
    for entry in flat:
        row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if r is None else r for p, r in zip(parameters, row, strict=True)]
        rows.append(torch.cat([r.flatten() for r in parts]) @ v)
    product = torch.stack(rows)
    return [
        part.reshape(p.shape)
        for p, part in zip(parameters, product.split([p.numel() for p in parameters]), strict=True)
    ]


@pytest.mark.usefixtures("float64")
def test_second_is_the_papers_under_sgd() -> None:
    """lr <g_i, grad L> - lr^2 / 2 <g_i, H sum_j g_j>, with the whole Hessian written out."""
    case = CASES["mlp"]
    rate = 0.3
    model, _, g, attributor = stepped(case, lambda p: SGD(p, lr=rate), scheme="second")
    parameters = list(model.parameters())
    loss = case.loss(model.eval(), case.batch(4, 90))
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    whole = [g[name].sum(dim=0) for name, _ in model.named_parameters()]
    turned = hessian_times(loss, parameters, whole)
    model.train()
    wanted = sum(
        (g[name] * (rate * first - rate**2 / 2 * second)).flatten(1).sum(1)
        for (name, _), first, second in zip(model.named_parameters(), gradients, turned, strict=True)
    )
    assert isinstance(wanted, Tensor)
    assert relative(values_of(attributor), wanted) < 1e-9


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "kind", [lambda p: SGD(p, lr=0.3, momentum=0.9), lambda p: AdamW(p, lr=1e-2), lambda p: Adam(p)]
)
@pytest.mark.parametrize("name", ["gpt", "hugging-face-gpt2", "lstm", "convolutional"])
def test_second_with_the_chord(name: str, kind: Any) -> None:
    """Against a central difference of gradients for H (c G), with fused attention and recurrent kernels among them."""
    case = CASES[name]
    model, optimizer, g, attributor = stepped(case, kind, scheme="second")
    parameters = dict(model.named_parameters())
    back = {p: real_move(optimizer, 0.0)[p] - move for p, move in real_move(optimizer, 1.0).items()}
    target = case.batch(4, 90)

    def gradient_at(step: float) -> list[Tensor]:
        with torch.no_grad():
            for p, way in back.items():
                p.add_(way, alpha=step)
        found = torch.autograd.grad(case.loss(model.eval(), target), list(back), allow_unused=True)
        with torch.no_grad():
            for p, way in back.items():
                p.sub_(way, alpha=step)
        model.train()
        return [torch.zeros_like(p) if f is None else f for p, f in zip(back, found, strict=True)]

    h = 1e-4
    turned = [(up - down) / (2 * h) for up, down in zip(gradient_at(h), gradient_at(-h), strict=True)]
    q = {}
    for p, first, second in zip(back, gradient_at(0.0), turned, strict=True):
        assert p.grad is not None
        q[p] = torch.where(p.grad == 0, 0.0, back[p] / p.grad) * (first - second / 2)
    wanted = sum((g[n] * q[p]).flatten(1).sum(1) for n, p in parameters.items() if p in q)
    assert isinstance(wanted, Tensor)
    assert relative(values_of(attributor), wanted) < 1e-5  # the difference's own error


def test_an_operator_without_a_double_backward_is_an_error_that_says_so() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(Once.apply(torch.tanh(self.first(x))))
            return found

    case = Case(Model, CASES["mlp"].batch, CASES["mlp"].losses)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss, scheme="second")
    with attributor.batch(range(4)):
        case.loss(model, case.batch(4, 0)).backward()
    with pytest.raises(
        InrunError,
        match=r"target 't': scheme='second' needs a double.*once_differentiable.*Use scheme='path'",
    ):
        optimizer.step()


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8])
def test_gauss_nodes_are_exact_for_polynomials_of_twice_their_number(nodes: int) -> None:
    degree = 2 * nodes - 1
    assert sum(weight * x**degree for x, weight in gauss_nodes(nodes)) == pytest.approx(1 / (degree + 1), rel=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [lambda p: SGD(p, lr=0.3, momentum=0.9), lambda p: AdamW(p, lr=1e-2)])
def test_gauss_nodes_are_taken_where_they_lie(kind: Any) -> None:
    case = CASES["gpt"]
    model, optimizer, g, attributor = stepped(case, kind, nodes=2, rule="gauss")
    places, weights = np.polynomial.legendre.leggauss(2)
    low, high = real_move(optimizer, 0.0), real_move(optimizer, 1.0)
    q: dict[nn.Parameter, Tensor] = {}
    for x, weight in zip((places + 1) / 2, weights / 2, strict=True):
        kept = {p: p.detach().clone() for p in low}
        with torch.no_grad():
            for p in low:
                p.add_(low[p] + float(x) * (high[p] - low[p]))
        gradients = torch.autograd.grad(case.loss(model.eval(), case.batch(4, 90)), list(low))
        with torch.no_grad():
            for p, before in kept.items():
                p.copy_(before)
        for p, gradient in zip(low, gradients, strict=True):
            assert p.grad is not None
            chord = torch.where(p.grad == 0, 0.0, (low[p] - high[p]) / p.grad)
            q[p] = q.get(p, torch.zeros_like(p)) + float(weight) * chord * gradient
    model.train()
    wanted = contracted(model, g, q)
    assert relative(values_of(attributor), wanted) < 1e-9


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("rate", "tolerance", "most", "nodes"),
    [(0.01, 0.05, 9, 1), (0.5, 0.001, 9, 3), (4.0, 1e-6, 9, 9), (4.0, 1e-6, 3, 3), (4.0, 1e-6, 8, 3)],
)
def test_adaptive_adds_nodes_until_the_sum_is_the_measured_drop(
    tmp_path: Path, rate: float, tolerance: float, most: int, nodes: int
) -> None:
    """It ends at 1, 3 or 9 nodes, whose values are those of that fixed number (under SGD, where one chord is as good as
    many), and says how many it took.
    """
    case = CASES["gpt"]

    def kind(p: Any) -> Optimizer:
        return SGD(p, lr=0.1, momentum=0.9)

    def at_rate(optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = rate

    settings: dict[str, Any] = {"tolerance": tolerance, "max_nodes": most}
    _, optimizer, _, attributor = stepped(case, kind, nodes="adaptive", ledger=tmp_path, **settings)
    at_rate(optimizer)
    found = values_of(attributor)
    books = Ledger(tmp_path).steps("t")
    assert books["target_gradients"].to_list() == [nodes]
    _, optimizer, _, fixed = stepped(case, kind, nodes=nodes)
    at_rate(optimizer)
    assert relative(found, values_of(fixed)) < 1e-12


@pytest.mark.usefixtures("float64")
def test_adaptive_takes_for_each_target_what_it_needs() -> None:
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=1.0)
    targets = {"flat": case.batch(4, 1), "steep": case.batch(4, 2)}

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if batch is targets["flat"]:
            return model.get_parameter("lm_head.weight").sum()
        return torch.exp(2 * case.loss(model, batch))

    with Attributor(model, optimizer, targets, loss, nodes="adaptive", tolerance=1e-4) as attributor:
        with attributor.batch(range(5)):
            case.loss(model, case.batch(5, 7)).backward()
        valued = attributor._value(1, attributor._moves(), False, 0)
        optimizer.step()
    taken = {name: row["target_gradients"] for name, row in valued.rows.items()}
    assert taken["flat"] < taken["steep"]
    assert list(valued.rows) == ["flat", "steep"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", ["first", "second", "path"])
def test_two_optimizers_are_one_step(scheme: Any) -> None:
    """Two of one kind, each with half of the parameters, value as one with all of them; in either order of stepping."""
    case = CASES["gpt"]

    def values(halves: bool, order: int = 1) -> list[Tensor]:
        torch.manual_seed(0)
        model = case.build()
        parameters = list(model.parameters())
        parts = [parameters[::2], parameters[1::2]] if halves else [parameters]
        optimizers = [AdamW(part, lr=1e-2) for part in parts]
        found = []
        with Attributor(model, optimizers, {"t": case.batch(4, 90)}, case.loss, scheme=scheme) as attributor:
            for step in range(3):
                with attributor.batch(range(5)):
                    case.loss(model, case.batch(5, step)).backward()
                for optimizer in optimizers[::order]:
                    optimizer.step()
                    optimizer.zero_grad()
                assert attributor.last is not None
                found.append(attributor.last.values["t"])
        return found

    wanted = values(halves=False)
    for order in (1, -1):
        for found, one in zip(values(halves=True, order=order), wanted, strict=True):
            assert relative(found, one) < 1e-12


@pytest.mark.usefixtures("float64")
def test_muon_for_the_matrices_and_adamw_for_the_rest(tmp_path: Path) -> None:
    """Its values are <g_i, q> with q by autograd through each optimizer's own move, and the run's books balance."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = GPT()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("h.")]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [Muon(matrices, lr=0.02), AdamW(rest, lr=1e-2)]
    target = case.batch(4, 90)
    attributor = Attributor(model, optimizers, {"t": target}, case.loss, nodes=2, ledger=tmp_path, audit_every=1)
    for step in range(12):
        batch = case.batch(5, step)
        g = per_example_gradients(model, case.parts(batch, 5))
        with attributor.batch(range(5)):
            case.loss(model, batch).backward()
        moves = {
            p: Moved(p.detach(), p.grad, o.state.get(p, {}), o.param_groups[0], update_of(o))
            for o in optimizers
            for p in o.param_groups[0]["params"]
            if p.grad is not None
        }
        q = {p: torch.zeros_like(p) for p in moves}
        for a, b in ((0.0, 0.5), (0.5, 1.0)):
            ends = {p: [m.update.displacement(m, s) for s in (a, b)] for p, m in moves.items()}
            middle = {p: (low + high) / 2 for p, (low, high) in ends.items()}
            kept = {p: p.detach().clone() for p in moves}
            with torch.no_grad():
                for p, move in middle.items():
                    p.add_(move)
            gradients = torch.autograd.grad(case.loss(model.eval(), target), list(moves))
            with torch.no_grad():
                for p, weight in kept.items():
                    p.copy_(weight)
            model.train()
            for (p, m), gradient in zip(moves.items(), gradients, strict=True):
                if any(p is matrix for matrix in matrices):
                    q[p] += update_of(optimizers[0]).pull_back(m, a, b)[1](gradient)
                else:
                    low, high = ends[p]
                    assert p.grad is not None
                    q[p] += torch.where(p.grad == 0, 0.0, (low - high) / p.grad) * gradient
        wanted = contracted(model, g, q)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert attributor.last is not None
        assert relative(attributor.last.values["t"], wanted) < 1e-7
    attributor.close()
    books = Ledger(tmp_path).steps("t")
    drop = float((books["loss_before"] - books["loss_after"]).sum())
    assert abs(float(books["unexplained"].sum())) < 0.05 * abs(drop)
    assert Ledger(tmp_path).run["optimizer"]["class"] == "Muon + AdamW"


def test_optimizers_that_do_not_step_together_are_refused() -> None:
    case = CASES["gpt"]
    model = case.build()
    parameters = list(model.parameters())
    one, two = SGD(parameters[:4], lr=0.1), AdamW(parameters[4:])
    with pytest.raises(InrunError, match="held by two optimizers"):
        Attributor(model, [one, SGD(parameters[3:], lr=0.1)], {"t": case.batch(3, 1)}, case.loss)
    attributor = Attributor(model, [one, two], {"t": case.batch(3, 1)}, case.loss)
    with attributor.batch(range(4)):
        case.loss(model, case.batch(4, 0)).backward()
    one.step()
    assert attributor.last is None
    with pytest.raises(InrunError, match=r"SGD\.step\(\) was called twice for one batch"):
        one.step()
    with pytest.raises(InrunError, match="1 of 2 optimizers have not stepped"), attributor.batch(range(4)):
        pass
    two.step()
    assert attributor.last is not None


def test_a_gradient_changed_between_two_optimizers_steps_is_found() -> None:
    case = CASES["gpt"]
    model = case.build()
    parameters = list(model.parameters())
    one, two = SGD(parameters[:4], lr=0.1), AdamW(parameters[4:])
    attributor = Attributor(model, [one, two], {"t": case.batch(3, 1)}, case.loss)
    with attributor.batch(range(4)):
        case.loss(model, case.batch(4, 0)).backward()
    one.step()
    nn.utils.clip_grad_norm_(parameters[4:], 1e-3)
    with pytest.raises(InrunError, match="between two optimizers' steps"):
        two.step()
