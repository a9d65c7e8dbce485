"""momentum="credit" against its definition, with every contribution kept and every past step's share written out."""

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from inrun import Attributor, ConservationError, InrunError, Ledger
from inrun.oracle import per_example_gradients
from inrun.scratch import Scratch
from tests.models import CASES

Kind = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Kind] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.5, weight_decay=0.01),
    "sgd-nesterov": lambda p: SGD(p, lr=0.01, momentum=0.5, nesterov=True, maximize=True),
    "sgd-dampened": lambda p: SGD(p, lr=0.1, momentum=0.6, dampening=0.4, weight_decay=0.02),
    "sgd-plain": lambda p: SGD(p, lr=0.1),
    "adam": lambda p: Adam(p, lr=1e-2, betas=(0.5, 0.9), weight_decay=0.05),
    "adamw": lambda p: AdamW(p, lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1, amsgrad=True),
}
CASE = CASES["gpt"]
N = 4


def rate(step: int) -> float:
    return min(1.0, step / 5) / (1 + step / 50)


class Definition:
    """The values by the design's formula, 2.3: all gradients of all steps, and every step's real scale and move."""

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.g: list[dict[str, Tensor]] = []
        self.u: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.group = dict(optimizer.param_groups[0])
        self.names = {p: n for n, p in model.named_parameters()}

    def after(self, optimizer: Optimizer, before: dict[str, Tensor], model: nn.Module, target: Tensor) -> None:
        """Record a step that was taken: the target's gradient in the middle of the real move, times the real scale."""
        after = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_((before[n] + after[n]) / 2)
        gradients = torch.autograd.grad(CASE.loss(model.eval(), target), list(model.parameters()))
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(after[n])
        model.train()
        u = {}
        for (n, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            lr = optimizer.param_groups[0]["lr"]
            scale: Tensor | float = lr
            if "betas" in self.group:
                t, (beta1, beta2) = len(self.g), self.group["betas"]
                v = optimizer.state[p]["max_exp_avg_sq" if self.group["amsgrad"] else "exp_avg_sq"]
                scale = lr / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + self.group["eps"])
            u[n] = gradient * scale * (-1 if self.group["maximize"] else 1)
        self.u.append(u)

    def share(self, t: int, k: int) -> float:
        """a(t, k): how much of the gradient of step k is in the move of step t (both from 0), but for the scale."""
        if "betas" in self.group:
            beta = self.group["betas"][0]
            return float((1 - beta) * beta ** (t - k))
        mu, taken = self.group["momentum"], 1.0 if k == 0 else 1 - self.group["dampening"]
        if mu == 0:
            return float(t == k)
        if self.group["nesterov"]:
            return float((t == k) + mu * taken * mu ** (t - k))
        return float(taken * mu ** (t - k))

    def values(self, k: int) -> Tensor:
        total = torch.zeros(N)
        for t in range(k, len(self.u)):
            for n, g in self.g[k].items():
                total += self.share(t, k) * (g * self.u[t][n]).flatten(1).sum(1)
        return total


def run(kind: Kind, steps: int, folder: Path, *, every: int = 0, **settings: Any) -> tuple[Definition, Ledger, float]:
    """Train, with credit and by the definition; returns it, the ledger and the target's real loss drop."""
    torch.manual_seed(0)
    model = CASE.build()
    optimizer = kind(model.parameters())
    base = optimizer.param_groups[0]["lr"]
    target = CASE.batch(3, 99)
    definition = Definition(optimizer, model)
    with torch.no_grad():
        first = float(CASE.loss(model, target))
    attributor = Attributor(
        model, optimizer, {"t": target}, CASE.loss, momentum="credit", ledger=folder, audit_every=every, **settings
    )
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = base * rate(step)
        batch = CASE.batch(N, step)
        definition.g.append(per_example_gradients(model, CASE.parts(batch, N)))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        with attributor.batch([f"{step}-{i}" for i in range(N)]):
            CASE.loss(model, batch).backward()
        optimizer.step()
        definition.after(optimizer, before, model, target)
    attributor.close()
    with torch.no_grad():
        last = float(CASE.loss(model, target))
    return definition, Ledger(folder), first - last


def check(definition: Definition, ledger: Ledger, steps: int) -> None:
    found = ledger.scan().collect().sort("step")
    assert found.height == steps * N
    for k in range(steps):
        mine = torch.tensor(found["value"][k * N : (k + 1) * N].to_list())
        assert found["id"][k * N : (k + 1) * N].to_list() == [f"{k + 1}-{i}" for i in range(N)]
        wanted = definition.values(k)
        assert float((mine - wanted).abs().max() / wanted.abs().max()) < 1e-9, k


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_values_are_the_definitions(kind: str, tmp_path: Path) -> None:
    """Over 90 steps: with a momentum of a half, a block is settled 53 steps after it is full, long before the end."""
    steps = 90
    definition, ledger, drop = run(OPTIMIZERS[kind], steps, tmp_path, every=1)
    check(definition, ledger, steps)
    books = ledger.steps("t")
    assert books["step"].to_list() == list(range(1, steps + 1))
    values = float(ledger.values("t")["value"].sum())
    assert values == pytest.approx(float(books["value"].sum()), rel=1e-9)  # paid to examples = paid by the moves
    accounts = {name: float(books[name].sum()) for name in ("value", "momentum", "decay", "unexplained")}
    assert sum(accounts.values()) == pytest.approx(drop, rel=1e-9)
    assert accounts["momentum"] == 0.0
    assert (accounts["decay"] != 0.0) == ("decay" in kind or kind in ("sgd", "sgd-dampened", "adam", "adamw"))
    assert abs(accounts["unexplained"]) < 0.05 * abs(drop)
    assert books["conservation"].max() < 1e-12  # type: ignore[operator]


@pytest.mark.usefixtures("float64")
def test_the_whole_drop_of_a_run_is_explained(tmp_path: Path) -> None:
    """200 steps of a small GPT under AdamW: at most 1% of the drop is unexplained."""
    _, ledger, drop = run(lambda p: AdamW(p, lr=3e-3, weight_decay=0.1), 200, tmp_path, every=1)
    unexplained = float(ledger.steps("t")["unexplained"].sum())
    assert drop > 0.05
    assert abs(unexplained) <= 0.01 * drop


@pytest.mark.usefixtures("float64")
def test_contributions_on_disk_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    on_disk = Scratch._on_disk

    def counted(self: Scratch, tensors: Any) -> Any:
        written.append(tensors)
        return on_disk(self, tensors)

    monkeypatch.setattr(Scratch, "_on_disk", counted)
    definition, ledger, _ = run(OPTIMIZERS["adamw"], 40, tmp_path, memory=3_000_000)
    assert 0 < len(written) < 40
    check(definition, ledger, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "steps", "values"]  # nothing stays


@pytest.mark.usefixtures("float64")
def test_momentum_from_before_has_an_account_of_its_own(tmp_path: Path) -> None:
    """Attached in mid-run, what earlier gradients go on doing is paid to nobody; and the books still balance."""
    torch.manual_seed(0)
    model = CASE.build()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.8)
    target = CASE.batch(3, 99)

    def step(k: int, attributor: Attributor | None) -> None:
        optimizer.zero_grad()
        if attributor is None:
            CASE.loss(model, CASE.batch(N, k)).backward()
        else:
            with attributor.batch(range(N)):
                CASE.loss(model, CASE.batch(N, k)).backward()
        optimizer.step()

    for k in range(5):
        step(k, None)
    left = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    with Attributor(
        model, optimizer, {"t": target}, CASE.loss, momentum="credit", ledger=tmp_path, audit_every=1, nodes=2
    ) as attributor:
        for k in range(5, 15):
            before = [p.detach().clone() for p in model.parameters()]
            step(k, attributor)
            if k == 5:
                after = [p.detach().clone() for p in model.parameters()]
                wanted = 0.0
                for at in (0.25, 0.75):
                    with torch.no_grad():
                        for p, b, a in zip(model.parameters(), before, after, strict=True):
                            p.copy_(b + at * (a - b))
                    gradients = torch.autograd.grad(CASE.loss(model, target), list(model.parameters()))
                    wanted += sum(
                        0.5 * float((0.1 * 0.8 * left[p] * g).sum())
                        for p, g in zip(model.parameters(), gradients, strict=True)
                    )
                with torch.no_grad():
                    for p, a in zip(model.parameters(), after, strict=True):
                        p.copy_(a)
    books = Ledger(tmp_path).steps("t")
    assert books["momentum"][0] == pytest.approx(wanted, rel=1e-9)
    drops = (books["loss_before"] - books["loss_after"]).to_list()
    for k, drop in enumerate(drops):
        parts = [books[name][k] for name in ("value", "momentum", "decay", "unexplained")]
        assert sum(parts) == pytest.approx(drop, rel=1e-9)
    assert abs(float(books["unexplained"].sum())) < 0.02 * abs(sum(drops))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("at", [3, 37, 60])
def test_a_resumed_run_has_the_same_ledger(at: int, tmp_path: Path) -> None:
    """Checkpointed before, between and after blocks were settled; continued by a new attributor on a stale ledger."""
    steps = 75

    def train(folder: Path, first: int, last: int, state: dict[str, Any] | None) -> dict[str, Any]:
        torch.manual_seed(0)
        model = CASE.build()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        attributor = Attributor(
            model, optimizer, {"t": CASE.batch(3, 99)}, CASE.loss, momentum="credit", ledger=folder, resume=True
        )
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            attributor.load_state_dict(state["attributor"])
        taken: dict[str, Any] = {}
        for step in range(first, last + 1):
            optimizer.zero_grad()
            with attributor.batch(range(N)):
                CASE.loss(model, CASE.batch(N, step)).backward()
            optimizer.step()
            if step == at:
                taken = copy.deepcopy(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "attributor": attributor.state_dict(),
                    }
                )
                torch.save(taken, tmp_path / "checkpoint.pt")
        attributor.close()
        return taken

    train(tmp_path / "whole", 1, steps, None)
    train(tmp_path / "resumed", 1, at + 5, None)  # went on for five steps after its checkpoint
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    train(tmp_path / "resumed", at + 1, steps, state)
    whole, resumed = (Ledger(tmp_path / name) for name in ("whole", "resumed"))
    assert resumed.scan().collect().equals(whole.scan().collect())
    assert resumed.steps("t").equals(whole.steps("t"))


def attributor_of(model: nn.Module, optimizer: Optimizer, **settings: Any) -> Attributor:
    return Attributor(model, optimizer, {"t": CASE.batch(3, 99)}, CASE.loss, momentum="credit", **settings)


def test_values_are_final_late_and_last_says_which(tmp_path: Path) -> None:
    model = CASE.build()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.1)
    attributor = attributor_of(model, optimizer)
    seen = []
    for step in range(60):
        optimizer.zero_grad()
        with attributor.batch(range(N)):
            CASE.loss(model, CASE.batch(N, step)).backward()
        optimizer.step()
        seen.append(attributor.last.step if attributor.last else 0)
    alive = math.ceil(math.log(torch.finfo(torch.float32).eps) / math.log(0.1))
    assert seen[15 + alive - 1] == 0
    assert seen[16 + alive - 1] == 16
    attributor.close()
    assert attributor.last is not None
    assert attributor.last.step == 60


def test_without_room_it_is_refused_with_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASE.build()
    before = copy.deepcopy(model.state_dict())
    optimizer = AdamW(model.parameters())
    monkeypatch.setattr(Scratch, "room", lambda self: 1_000_000)
    attributor = attributor_of(model, optimizer, memory=1_000_000, ledger=tmp_path)
    with attributor.batch(range(N)):
        CASE.loss(model, CASE.batch(N, 0)).backward()
    with pytest.raises(InrunError, match=r"about 183 steps of .* GiB: .* GiB\. There are .* GiB.*momentum='account'"):
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_what_credit_cannot_do_is_refused() -> None:
    model = nn.Linear(6, 3)
    loss, target = CASES["mlp"].loss, {"t": CASES["mlp"].batch(3, 1)}
    for optimizer in (Muon([model.weight]), torch.optim.NAdam(model.parameters())):
        with pytest.raises(InrunError, match=r"SGD, Adam and AdamW; not for (Muon|NAdam)"):
            Attributor(model, optimizer, target, loss, momentum="credit")
    sgd = SGD(model.parameters(), lr=0.1)
    refused: list[dict[str, Any]] = [{"nonfinite": "skip"}, {"audit_permutations": 10}]
    refused.append({"scheme": "first", "refresh": 2})
    for settings in refused:
        with pytest.raises(InrunError, match="goes with none of"):
            Attributor(model, sgd, target, loss, momentum="credit", **settings)
    attributor = Attributor(model, sgd, target, loss, momentum="credit")
    with pytest.raises(InrunError, match="does not hold the contributions"):
        attributor.load_state_dict({"step": 3})


def test_a_use_of_a_parameter_that_was_not_seen_is_named() -> None:
    case = CASES["mlp"]
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss, momentum="credit")
    with attributor.batch(range(4)):
        (case.loss(model, case.batch(4, 0)) + next(model.parameters()).square().sum()).backward()
    with pytest.raises(ConservationError, match=r"weight, .*bias"):
        optimizer.step()
