"""Kernels, what they keep, and the gradients of targets that are used for several steps."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor, InrunError, Ledger, NonFiniteError, audit
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import CASES, GPT, Case, class_losses, hugging_face_gpt2, token_losses, tokens, vectors

GPT_CASE = CASES["gpt"]


def values(
    case: Case, kernel: Kernel, scheme: Any = "path", kind: type[Optimizer] = AdamW, steps: int = 3, **settings: Any
) -> Tensor:
    """[steps, targets, examples] of a short run."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = kind(model.parameters(), lr=1e-2)  # type: ignore[call-arg]
    targets = {f"t{k}": case.batch(3, 90 + k) for k in range(3)}
    found = []
    with Attributor(model, optimizer, targets, case.loss, scheme=scheme, kernel=kernel, **settings) as attributor:
        for step in range(steps):
            for n in (5, 3):
                with attributor.batch(range(n)):
                    (case.loss(model, case.batch(n, 10 * step + n)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert attributor.last is not None
            found.append(torch.stack(list(attributor.last.values.values())))
    return torch.stack(found)


@pytest.mark.parametrize("name", ["gpt", "hugging-face-gpt2", "hugging-face-llama", "mlp", "repeated", "convolutional"])
@pytest.mark.parametrize("scheme", ["first", "second", "path"])
def test_kernels_agree_in_float32(name: str, scheme: str) -> None:
    reference = values(CASES[name], "tangent", scheme)
    for kernel in ("perexample", "auto"):
        found = values(CASES[name], kernel, scheme)
        assert float((found - reference).norm() / reference.norm()) < 1e-4


@pytest.mark.parametrize("name", ["gpt", "hugging-face-gpt2", "hugging-face-llama", "mlp", "repeated", "convolutional"])
def test_kernels_agree_in_float32_under_sgd(name: str) -> None:
    reference = values(CASES[name], "tangent", "first", SGD)
    for kernel in ("perexample", "ghost", "auto"):
        found = values(CASES[name], kernel, "first", SGD)
        assert float((found - reference).norm() / reference.norm()) < 1e-4


@pytest.mark.parametrize(("scheme", "kind"), [("path", AdamW), ("first", SGD)])
def test_what_memory_does_not_hold_goes_to_disk(scheme: str, kind: type[Optimizer], tmp_path: Path) -> None:
    """The same values, a note that says how many examples fit, and nothing left behind."""
    reference = values(GPT_CASE, "tangent", scheme, kind)
    with pytest.warns(UserWarning, match=r"About \d+ examples a step fit"):
        found = values(GPT_CASE, "tangent", scheme, kind, memory=10_000, ledger=tmp_path)
    assert torch.equal(found, reference)
    assert not list(tmp_path.glob(".inrun-*"))
    if scheme == "path":
        # what is formed stays below the budget: of what is beyond, inputs and output gradients are kept, on disk
        with pytest.warns(UserWarning, match="go to disk"):
            late = values(GPT_CASE, "perexample", scheme, kind, memory=10_000)
        assert float((late - reference).norm() / reference.norm()) < 1e-4


def test_gradients_are_formed_late_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that are cut into slices, at once or at the step."""
    monkeypatch.setattr("inrun.tangent.fused._ROOM", 2_000)
    for scheme, kind in (("first", SGD), ("path", AdamW)):
        reference = values(CASES["hugging-face-gpt2"], "tangent", scheme, kind)
        found = values(CASES["hugging-face-gpt2"], "perexample", scheme, kind)
        assert float((found - reference).norm() / reference.norm()) < 1e-4
    with pytest.warns(UserWarning, match="go to disk"):
        late = values(CASES["hugging-face-gpt2"], "perexample", memory=1_000)
    reference = values(CASES["hugging-face-gpt2"], "tangent")
    assert float((late - reference).norm() / reference.norm()) < 1e-4


def test_ghost_is_refused_where_it_is_not_the_value() -> None:
    model = nn.Linear(6, 3)
    for scheme, optimizer in (("path", SGD(model.parameters(), lr=0.1)), ("first", AdamW(model.parameters()))):
        with pytest.raises(InrunError, match="kernel='ghost'"):
            Attributor(
                model,
                optimizer,
                {"t": vectors(3, 1)},
                lambda m, b: class_losses(m, b).mean(),
                scheme=scheme,  # type: ignore[arg-type]
                kernel="ghost",
            )


def attributed(kind: type[Optimizer] = SGD, **settings: Any) -> tuple[nn.Module, Optimizer, Attributor]:
    torch.manual_seed(0)
    model = GPT()
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    target = {"t": [tokens(2, 90 + k) for k in range(3)]}
    return model, optimizer, Attributor(model, optimizer, target, GPT_CASE.loss, scheme="first", **settings)


def step(model: nn.Module, optimizer: Optimizer, attributor: Attributor, seed: int) -> Tensor:
    with attributor.batch(range(4)):
        GPT_CASE.loss(model, tokens(4, seed)).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert attributor.last is not None
    return attributor.last.values["t"]


def test_clipping_by_value_at_once_is_an_error_that_says_what_to_do() -> None:
    model, optimizer, attributor = attributed(kernel="perexample")
    with attributor.batch(range(4)):
        GPT_CASE.loss(model, tokens(4, 1)).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    with pytest.raises(InrunError, match="kernel='tangent'"):
        optimizer.step()


def test_a_game_needs_gradients_that_are_kept() -> None:
    model, _, attributor = attributed(kernel="perexample")
    with attributor.batch(range(4)):
        GPT_CASE.loss(model, tokens(4, 1)).backward()
    with pytest.raises(InrunError, match="kernel='tangent'"):
        audit(attributor)
    model, optimizer, attributor = attributed(kernel="perexample", audit_every=1, audit_permutations=10)
    step(model, optimizer, attributor, 1)


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_targets_loss_that_is_not_finite_is_the_steps(how: Any) -> None:
    torch.manual_seed(0)
    model = GPT()
    optimizer = SGD(model.parameters(), lr=0.1)
    bad = False

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return GPT_CASE.loss(model, batch) * (math.nan if bad else 1.0)

    attributor = Attributor(model, optimizer, {"t": tokens(2, 9)}, loss, scheme="first", nonfinite=how)
    for k in range(3):
        bad = k == 1
        with attributor.batch(range(4)):
            GPT_CASE.loss(model, tokens(4, k)).backward()
        if bad and how == "stop":
            with pytest.raises(NonFiniteError, match=r"step 2: the loss of target 't' is nan"):
                optimizer.step()
            return
        optimizer.step()
        optimizer.zero_grad()
        assert attributor.last is not None
        assert attributor.last.skipped == bad


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_gradient_is_used_for_several_steps(kind: type[Optimizer]) -> None:
    """Of the weights and the batch at steps 1, 3, 6, ..., against g_i by autograd."""
    model, optimizer, attributor = attributed(kind, refresh=3)
    old: list[Tensor] = []
    for t in range(1, 8):
        if t == 1 or t % 3 == 0:
            loss = GPT_CASE.loss(model.eval(), tokens(2, 90 + t // 3 % 3))
            old = list(torch.autograd.grad(loss, list(model.parameters())))
            model.train()
        g = per_example_gradients(model, GPT_CASE.parts(tokens(4, t), 4))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        found = step(model, optimizer, attributor, t)
        # the chord by the real move and the one without data
        for p in twin.parameters():
            p.grad = torch.zeros_like(p)
        twin_optimizer.step()
        still = dict(twin.named_parameters())
        wanted = torch.zeros(4)
        for (n, p), target in zip(model.named_parameters(), old, strict=True):
            G = g[n].sum(dim=0)
            chord = torch.where(G == 0, 0.0, (still[n].detach() - p.detach()) / G)
            wanted += (g[n] * chord * target).flatten(1).sum(1)
            assert before[n].shape == p.shape
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-6
    attributor.close()


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_resumed_run_goes_on_with_the_same_gradient(kind: type[Optimizer], tmp_path: Path) -> None:
    whole = attributed(kind, refresh=4, ledger=tmp_path / "whole")
    for t in range(10):
        step(*whole, t)
    whole[2].close()
    first = attributed(kind, refresh=4, ledger=tmp_path / "cut")
    for t in range(6):
        step(*first, t)
    state = copy.deepcopy(first[2].state_dict())
    weights, moments = copy.deepcopy((first[0].state_dict(), first[1].state_dict()))
    for t in range(6, 8):
        step(*first, t)
    first[2].close()
    second = attributed(kind, refresh=4, ledger=tmp_path / "cut", resume=True)
    second[0].load_state_dict(weights)
    second[1].load_state_dict(moments)
    second[2].load_state_dict(state)
    for t in range(6, 10):
        step(*second, t)
    second[2].close()
    ledgers = [Ledger(tmp_path / name) for name in ("whole", "cut")]
    assert ledgers[0].steps("t").equals(ledgers[1].steps("t"))
    values = [ledger.values("t").sort("id")["value"].to_torch() for ledger in ledgers]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0.0)  # the sum of a column has no order
    assert Ledger(tmp_path / "cut").steps("t")["target_gradients"].to_list() == [1, 0, 0, 1, 0, 0, 0, 1, 0, 0]


def test_refresh_is_for_first() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(InrunError, match="refresh=2"):
        Attributor(
            model, SGD(model.parameters()), {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean(), refresh=2
        )


def test_weights_that_others_look_at_are_moved_in_place() -> None:
    """A plain attribute that shares a weight's memory sees the path's point, as the weight does."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
            self.seen = self.layer.weight.detach()

        def forward(self, x: Tensor) -> Tensor:
            assert torch.equal(self.seen, self.layer.weight)
            return torch.as_tensor(self.head(torch.tanh(self.layer(x))))

    model = Looking()
    case = Case(lambda: model, vectors, class_losses)
    optimizer = AdamW(model.parameters(), lr=0.1)
    before = model.layer.weight.detach().clone()
    with Attributor(model, optimizer, {"t": vectors(3, 1)}, case.loss) as attributor:
        with attributor.batch(range(4)):
            case.loss(model, vectors(4, 2)).backward()
        attributor._evaluate()
        assert torch.equal(model.layer.weight, before)
        optimizer.step()


def test_in_place_activations_after_a_unit() -> None:
    """Their gradients are those of the layer's own output."""
    for kernel in ("tangent", "perexample"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 9), nn.ELU(inplace=True), nn.Linear(9, 3)
        )
        optimizer = AdamW(model.parameters(), lr=1e-2)
        case = Case(lambda: model, vectors, class_losses)  # noqa: B023
        g = per_example_gradients(model, case.parts(vectors(5, 1), 5))
        with Attributor(model, optimizer, {"t": vectors(3, 2)}, case.loss, kernel=kernel) as attributor:
            with attributor.batch(range(5)) as microbatch:
                case.loss(model, vectors(5, 1)).backward()
            from inrun.tangent.per_example import per_example_gradients as formed

            for name, p in model.named_parameters():
                torch.testing.assert_close(formed(microbatch.captured)[p], g[name], rtol=1e-5, atol=1e-7)
            optimizer.step()


def test_hugging_face_is_fused() -> None:
    """No layer of GPT-2's is left to the slow way when asked for perexample."""
    model = hugging_face_gpt2()
    case = Case(lambda: model, tokens, token_losses)
    with Attributor(
        model, AdamW(model.parameters()), {"t": tokens(2, 1)}, case.loss, kernel="perexample"
    ) as attributor:
        with attributor.batch(range(4)) as microbatch:
            case.loss(model, tokens(4, 2)).backward()
        left = {type(call.unit.module).__name__ for call in microbatch.captured.calls}
        assert left == {"Embedding"}
        attributor.discard()


def test_weights_that_were_changed_for_the_batch_alone_are_an_error() -> None:
    """The target's gradient of `first` under SGD is taken ahead; with kernel="tangent" it is taken at the step."""
    for kernel, wrong in (("auto", True), ("tangent", False)):
        model, optimizer, attributor = attributed(kernel=kernel)
        with torch.no_grad():
            kept = [p.clone() for p in model.parameters()]
            for p in model.parameters():
                p.add_(0.01)
        with attributor.batch(range(4)):
            GPT_CASE.loss(model, tokens(4, 1)).backward()
        with torch.no_grad():
            for p, weight in zip(model.parameters(), kept, strict=True):
                p.copy_(weight)
        if wrong:
            with pytest.raises(InrunError, match="kernel='tangent'"):
                optimizer.step()
        else:
            optimizer.step()


def test_a_block_that_failed_leaves_no_gradient_behind() -> None:
    """Weights that are loaded anew after it have another."""
    found = []
    for fails in (False, True):
        model, optimizer, attributor = attributed(kernel="perexample")
        good = copy.deepcopy(model.state_dict())
        if fails:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
            with pytest.raises(InrunError, match="no gradient reached"), attributor.batch(range(4)):
                GPT_CASE.loss(model, tokens(4, 1))
            model.load_state_dict(good)
        found.append(step(model, optimizer, attributor, 1))
    assert torch.equal(*found)


def test_a_patched_linear_function_is_not_taken_for_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training is left as it is."""
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: plain(x, w.clamp(-0.1, 0.1), b))
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    case = CASES["mlp"]
    wanted = torch.autograd.grad(case.loss(model, case.batch(5, 1)), list(model.parameters()))
    attributor = Attributor(model, AdamW(model.parameters()), {"t": case.batch(3, 2)}, case.loss, kernel="perexample")
    with attributor.batch(range(5)):
        case.loss(model, case.batch(5, 1)).backward()
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient)
