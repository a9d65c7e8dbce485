"""g_i formed from what a batch captured, against one backward pass per example."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from inrun import Attributor
from inrun.captured import Captured
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients as oracle
from inrun.tangent.per_example import per_example_gradients, pulled_back, rule_of
from tests.core.test_traps import OnUnrolled, Positions, Switching, Tied
from tests.models import (
    CASES,
    GPT,
    VOCABULARY,
    Case,
    class_losses,
    hugging_face_gpt2,
    images,
    token_losses,
    tokens,
    vectors,
)

pytestmark = pytest.mark.usefixtures("float64")
N = 5


class Stacked(nn.Module):
    """An LSTM with dropout between its layers: a unit without a closed form that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(VOCABULARY, 8), nn.LSTM(8, 8, num_layers=2, dropout=0.3)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, x_BT: Tensor) -> Tensor:
        y_TBD, _ = self.lstm(self.embedding(x_BT.T))
        return torch.as_tensor(self.head(y_TBD)).transpose(0, 1)


class Offsets(nn.Module):
    """A linear layer and a norm whose output belongs to no example in particular, one [T, d], the other [1, T, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.shift = nn.Embedding(VOCABULARY, 4), nn.Linear(3, 4)
        self.norm, self.head = nn.LayerNorm((6, 4)), nn.Linear(4, VOCABULARY)
        self.place: Tensor
        self.register_buffer("place", torch.randn(6, 4))

    def forward(self, x_BT: Tensor) -> Tensor:
        h = self.wte(x_BT) + self.shift(self.place[:, :3]) + self.norm(self.place[None])
        return torch.as_tensor(self.head(torch.tanh(h)))


class Hooked(nn.Module):
    """Another library's hook changes what a layer returns, and a forward of its own what another computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.first.register_forward_hook(lambda module, args, output: output * 2 + output**2)
        plain = self.second.forward
        self.second.forward = lambda x: torch.sin(plain(x))  # type: ignore[method-assign, assignment]

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(torch.tanh(self.first(x))))


class Counting(nn.Module):
    """Counts its own calls in a buffer, and reads none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.as_tensor(self.head(torch.tanh(x * self.scale)))


def frozen_in_part() -> nn.Module:
    model = GPT()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in ("h.0.mlp.0.weight", "h.0.ln_1.bias", "wpe.weight", "ln_f.weight"))
    return model


def normalised() -> nn.Module:
    """Batch normalisation whose statistics are frozen, in a model that trains."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    model[1].eval()
    return model


def embedded(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Embedding(VOCABULARY, 4, **settings), nn.Linear(4, VOCABULARY))


SPECIAL = {
    "gpt-dropout": Case(lambda: GPT(dropout=0.2), tokens, token_losses),
    "hugging-face-gpt2-dropout": Case(lambda: hugging_face_gpt2(dropout=0.2), tokens, token_losses),
    "lstm-dropout": Case(Stacked, tokens, token_losses),
    "tied-three-times": Case(Tied, tokens, token_losses),
    "two-outputs": Case(OnUnrolled, vectors, class_losses),
    "batchless-embedding": Case(Positions, lambda n, seed: (tokens(n, seed, 5), vectors(n, seed)[1]), class_losses),
    "batchless-linear-and-norm": Case(Offsets, tokens, token_losses),
    "merged-in-blocks": Case(Switching, tokens, token_losses),
    "merged-interleaved": Case(
        Switching, tokens, lambda model, batch: token_losses(lambda x: model(x, 1), batch)  # type: ignore[arg-type]
    ),
    "another's-hook": Case(Hooked, vectors, class_losses),
    "counting-its-calls": Case(Counting, vectors, class_losses),
    "padding": Case(embedded(padding_idx=-2), tokens, token_losses),
    "scaled-by-frequency": Case(embedded(scale_grad_by_freq=True), tokens, token_losses),
    "frozen-in-part": Case(frozen_in_part, tokens, token_losses),
    "frozen-batch-norm": Case(normalised, images, class_losses),
}  # fmt: skip


def attributed(model: nn.Module, case: Case, kernel: Kernel = "tangent") -> Attributor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return Attributor(model, SGD(trained, lr=0.1), {"t": case.batch(3, 99)}, case.loss, kernel=kernel)


def capture(model: nn.Module, case: Case, batch: Any, seed: int, kernel: Kernel = "tangent") -> Captured:
    with attributed(model, case, kernel).batch(range(N)) as microbatch:
        torch.manual_seed(seed)
        case.loss(model, batch).backward()
    return microbatch.captured


def assert_close(g: Tensor, wanted: Tensor, what: str) -> None:
    assert g.shape == wanted.shape
    assert g.dtype == wanted.dtype
    scale = float(wanted.abs().max())
    assert float((g - wanted).abs().max()) <= 1e-10 * scale, what


@pytest.mark.parametrize("kernel", ["tangent", "perexample"])
@pytest.mark.parametrize("name", [*CASES, *SPECIAL])
def test_gradients_are_the_oracles_and_add_up_to_the_batchs(name: str, kernel: Kernel) -> None:
    case = {**CASES, **SPECIAL}[name]
    torch.manual_seed(0)
    model = case.build()
    batch = case.batch(N, 7)
    torch.manual_seed(3)
    wanted = oracle(model, case.parts(batch, N))
    captured = capture(model, case, batch, seed=3, kernel=kernel)
    model.eval()  # the mode and the random state are the call's, not today's
    state = torch.get_rng_state()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    g = per_example_gradients(captured)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert {name for name, p in model.named_parameters() if p in g} == set(wanted)
    for name, p in model.named_parameters():
        if p in g:
            assert_close(g[p], wanted[name], name)
            assert p.grad is not None
            assert_close(g[p].sum(dim=0), p.grad, name)


@pytest.mark.parametrize("name", [*CASES, *SPECIAL])
def test_closed_forms_are_the_generic_rules(name: str) -> None:
    case = {**CASES, **SPECIAL}[name]
    torch.manual_seed(0)
    model = case.build()
    captured = capture(model, case, case.batch(N, 7), seed=3)
    for call in captured.calls:
        rule = rule_of(call)
        if rule is not None:
            generic, closed = pulled_back(call, N), rule(call, N)
            for parameter in call.unit.parameters:
                assert_close(closed[parameter], generic[parameter], f"{call.unit.name}.{parameter}")


def test_the_common_layers_have_closed_forms_and_changed_ones_have_none() -> None:
    def closed(case: Case) -> set[str]:
        model = case.build()
        calls = capture(model, case, case.batch(N, 7), seed=0).calls
        return {type(call.unit.module).__name__ for call in calls if rule_of(call) is not None}

    assert closed(CASES["hugging-face-gpt2"]) == {"Embedding", "Conv1D", "LayerNorm", "Linear"}
    assert closed(CASES["hugging-face-llama"]) == {"Embedding", "LlamaRMSNorm", "Linear"}
    assert closed(CASES["repeated"]) == {"Embedding", "RMSNorm", "Linear"}
    assert closed(SPECIAL["another's-hook"]) == set()


@pytest.mark.parametrize("name", ["gpt-dropout", "lstm-dropout", "convolutional"])
def test_accumulated_batches_each_have_their_own(name: str) -> None:
    """Two blocks before a step, of different sizes: the parts of both add up to the accumulated gradient."""
    case = {**CASES, **SPECIAL}[name]
    torch.manual_seed(0)
    model = case.build()
    attributor = attributed(model, case)
    total: dict[nn.Parameter, Tensor] = {}
    for n, seed in ((5, 1), (3, 2)):
        batch = case.batch(n, seed)
        torch.manual_seed(seed)
        wanted = oracle(model, case.parts(batch, 2 * n))
        with attributor.batch(range(n)) as microbatch:
            torch.manual_seed(seed)
            (case.loss(model, batch) / 2).backward()
        g = per_example_gradients(microbatch.captured)
        for name, p in model.named_parameters():
            assert_close(g[p], wanted[name], name)
            total[p] = total.get(p, torch.zeros_like(p)) + g[p].sum(dim=0)
    for p, sum_ in total.items():
        assert p.grad is not None
        assert_close(sum_, p.grad, "accumulated")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_in_the_parameters_own_precision(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    for case in (CASES["gpt"], CASES["repeated"], CASES["mlp"]):
        model = case.build()
        g = per_example_gradients(capture(model, case, case.batch(N, 7), seed=0))
        for p, found in g.items():
            assert found.dtype == dtype
            assert p.grad is not None
            scale = float(p.grad.abs().max())
            assert float((found.float().sum(dim=0) - p.grad.float()).abs().max()) <= 20 * torch.finfo(dtype).eps * scale
