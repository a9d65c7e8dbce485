"""What a loop or a model may do that would make a value wrong without a sign: each is valued rightly, or refused."""

import copy
import io
import warnings
from contextlib import nullcontext
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from inrun import Attributor, InrunError
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import CASES, VOCABULARY, Case, class_losses, mlp, token_losses, tokens, vectors
from tests.reference import contracted, reference_direction

pytestmark = pytest.mark.usefixtures("float64")


def check(case: Case, batches: list[Any], kind: Any = None) -> None:
    """A few attributed steps of `first`, each held against per-example autograd."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = (kind or (lambda p: SGD(p, lr=0.1)))(model.parameters())
    target = case.batch(3, 99)
    with Attributor(model, optimizer, {"t": target}, case.loss, scheme="first") as attributor:
        for batch in batches:
            n = len(batch[0]) if isinstance(batch, tuple) else len(batch)
            g = per_example_gradients(model, case.parts(batch, n))
            with attributor.batch(range(n)):
                case.loss(model, batch).backward()
            q = reference_direction(model, optimizer, case.at(target), "first", 1)
            optimizer.step()
            optimizer.zero_grad()
            wanted = contracted(model, g, q)
            assert attributor.last is not None
            torch.testing.assert_close(attributor.last.values["t"], wanted, rtol=1e-8, atol=1e-13)


def setting(optimizer: Any = None, **settings: Any) -> tuple[nn.Module, Optimizer, Attributor]:
    torch.manual_seed(0)
    model = mlp()
    built: Optimizer = (optimizer or (lambda p: SGD(p, lr=0.1)))(model.parameters())
    return (
        model,
        built,
        Attributor(model, built, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean(), **settings),
    )


def backward(model: nn.Module, attributor: Attributor, scale: float = 1.0) -> None:
    with attributor.batch(range(4)):
        (class_losses(model, vectors(4, 0)).mean() * scale).backward()


def test_a_gradient_scaled_without_a_trace_is_followed() -> None:
    """Through .data, a tensor's version does not count; the values follow all the same."""
    found = []
    for scale in (1.0, 0.25):
        model, optimizer, attributor = setting(scheme="first")
        backward(model, attributor)
        for p in model.parameters():
            assert p.grad is not None
            p.grad.data.mul_(scale)
        optimizer.step()
        assert attributor.last is not None
        found.append(attributor.last.values["t"])
    torch.testing.assert_close(found[1], 0.25 * found[0], rtol=1e-9, atol=0.0)


def test_a_gradient_scaler_is_followed_or_refused() -> None:
    torch.set_default_dtype(torch.float32)
    plain_model, plain_optimizer, plain = setting()
    backward(plain_model, plain)
    plain_optimizer.step()
    model, optimizer, attributor = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(model, attributor, scale=float(scaler.scale(torch.ones(()))))
    scaler.step(optimizer)
    assert plain.last is not None
    assert attributor.last is not None
    torch.testing.assert_close(attributor.last.values, plain.last.values, rtol=1e-5, atol=1e-8)
    model, optimizer, attributor = setting(lambda p: AdamW(p, fused=True))
    backward(model, attributor, scale=float(scaler.scale(torch.ones(()))))
    with pytest.raises(InrunError, match=r"call scaler\.unscale_"):
        scaler.step(optimizer)


def test_a_hook_that_clips_inside_of_the_step_is_found() -> None:
    model, optimizer, attributor = setting()

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    optimizer.register_step_pre_hook(clip)
    backward(model, attributor)
    with pytest.raises(InrunError, match=r"changed inside of optimizer\.step"):
        optimizer.step()


def test_parameters_that_are_trained_later_are_refused() -> None:
    model = mlp()
    first = next(iter(model.children()))
    first.requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attributor = Attributor(model, optimizer, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean())
    first.requires_grad_(True)
    optimizer.add_param_group({"params": list(first.parameters())})
    backward(model, attributor)
    with pytest.raises(InrunError, match="attach again"):
        optimizer.step()


def test_a_gradient_zeroed_before_the_step_is_told() -> None:
    model, optimizer, attributor = setting()
    backward(model, attributor)
    optimizer.zero_grad()
    with pytest.raises(InrunError, match=r"zero_grad\(\) after optimizer.step"):
        optimizer.step()


class Unpadded(nn.Module):
    """Computes its head on the unmasked tokens only: how many an example has is in the data, not in the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

    def forward(self, x_BT: Tensor) -> Tensor:
        h, mask = self.embedding(x_BT), x_BT != 0
        logits = h.new_zeros(*x_BT.shape, VOCABULARY)
        logits[mask] = self.head(h[mask])
        return torch.as_tensor(logits)


def test_unpadded_tokens_are_told_apart_even_where_their_number_divides() -> None:
    batch = tokens(4, 0).clamp_min(1)
    batch[:, 3:] = 0
    check(Case(Unpadded, tokens, token_losses), [batch, tokens(4, 1)])


class Switching(nn.Module):
    """Lays its tokens out in another order when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)
        self.calls = 0

    def forward(self, x_BT: Tensor, layout: int = 0) -> Tensor:
        h = self.embedding(x_BT)
        if layout:
            flat: Tensor = self.head(h.transpose(0, 1).reshape(-1, 4))
            return flat.reshape(h.shape[1], h.shape[0], -1).transpose(0, 1)
        return torch.as_tensor(self.head(h.reshape(-1, 4))).reshape(*h.shape[:2], -1)


def test_another_layout_under_another_argument_is_found_out() -> None:
    def losses(model: nn.Module, batch_BT: Tensor) -> Tensor:
        logits = model(batch_BT[:, :-1], int(batch_BT[0, -1]) % 2)
        return F.cross_entropy(logits.transpose(1, 2), batch_BT[:, 1:], reduction="none").mean(dim=1)

    batches = [tokens(4, seed) for seed in range(6)]
    assert {int(b[0, -1]) % 2 for b in batches} == {0, 1}
    check(Case(Switching, tokens, losses), batches)


class WithTeacher(nn.Module):
    """Calls its own layer without gradients first, in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

    def forward(self, x_BT: Tensor) -> Tensor:
        h = self.embedding(x_BT)
        with torch.no_grad():
            teacher = self.head(h.reshape(-1, 4)).reshape(*h.shape[:2], -1)
        student = self.head(h.transpose(0, 1).reshape(-1, 4)).reshape(h.shape[1], h.shape[0], -1).transpose(0, 1)
        return torch.as_tensor(student + 0.1 * teacher.tanh())


def test_calls_without_gradients_keep_their_place_in_the_count() -> None:
    check(Case(WithTeacher, tokens, token_losses), [tokens(4, 0), tokens(4, 1)])


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.head = nn.Embedding(VOCABULARY, 4), nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.wte(x_BT) + self.wpe(torch.arange(x_BT.shape[1]))).mean(dim=1))
        return logits


def test_a_single_token_is_not_taken_for_a_batch_of_one() -> None:
    def batch(n: int, seed: int, length: int = 5) -> tuple[Tensor, Tensor]:
        return tokens(n, seed, length), vectors(n, seed)[1]

    case = Case(Positions, batch, class_losses)
    check(case, [batch(4, 0), batch(4, 1, length=1), batch(1, 2, length=1), batch(4, 3, length=4)])
    check(case, [batch(4, 1, length=1), batch(4, 3)])


class Unrolled(nn.Module):
    """A recurrent cell in Python that returns all of its states and, once more, the last."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        states, h = [], x_BD
        for _ in range(3):
            h = torch.tanh(h @ self.w)
            states.append(h)
        return torch.stack(states, dim=1), h


class OnUnrolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = Unrolled(), nn.Linear(6, 3)

    def forward(self, x_BD: Tensor) -> Tensor:
        states, last = self.cell(x_BD)
        logits: Tensor = self.head(states.sum(dim=1) + last)
        return logits


def test_outputs_made_of_one_another_are_not_counted_twice() -> None:
    check(Case(OnUnrolled, vectors, class_losses), [vectors(4, 0), vectors(5, 1)])


class Tied(nn.Module):
    """One matrix under two names, and read a third time by the module that holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(VOCABULARY, 4, padding_idx=0), nn.Linear(4, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        self.own = self.wte.weight

    def forward(self, x_BT: Tensor) -> Tensor:
        h = self.wte(x_BT)
        return torch.as_tensor(self.head(h) + h @ self.own.tanh().T)


def test_a_parameter_owned_three_times_has_all_its_cross_terms() -> None:
    check(Case(Tied, tokens, token_losses), [tokens(4, 0), tokens(4, 1)])


def test_a_tied_hugging_face_head_with_a_bias_of_its_own() -> None:
    from transformers import BertConfig, BertForMaskedLM

    def build() -> nn.Module:
        return BertForMaskedLM(
            BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16,
                       max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )  # fmt: skip

    check(Case(build, tokens, token_losses), [tokens(4, 0), tokens(7, 1)])


@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_computed_of_others_is_valued_by_the_layer_around_it(kind: str, frozen: bool) -> None:
    make = getattr(nn.utils.parametrizations, kind)

    def build() -> nn.Module:
        layer = make(nn.Linear(6, 5))
        layer.parametrizations.requires_grad_(not frozen)
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))

    check(Case(build, vectors, class_losses), [vectors(4, 0)])


def test_a_weight_that_is_a_buffer_is_not_taken_for_a_parameter() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        for name in ("weight", "bias"):
            layer = model[0] if name == "weight" else model[2]
            value = getattr(layer, name).detach()
            delattr(layer, name)
            layer.register_buffer(name, value)
        return model

    check(Case(build, vectors, class_losses), [vectors(4, 0)])


@pytest.mark.parametrize("kernel", ["tangent", "perexample", "auto"])
def test_a_gradient_penalty_is_refused(kernel: Kernel) -> None:
    model, optimizer, attributor = setting(kernel=kernel)
    x, y = vectors(4, 0)

    def penalised() -> None:
        with attributor.batch(range(4)):
            loss = class_losses(model, (x.requires_grad_(), y)).mean()
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + gradient.square().sum()).backward()
        optimizer.step()

    with pytest.raises(InrunError, match="gradient penalty"):
        penalised()
    model, optimizer, attributor = setting(kernel=kernel)
    with attributor.batch(range(4)), warnings.catch_warnings(action="ignore"):
        class_losses(model, (x, y)).mean().backward(create_graph=True)  # of no use, and no harm
    optimizer.step()


def test_evaluating_between_backward_and_step_changes_nothing() -> None:
    case = CASES["lstm"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss) as attributor:
        with attributor.batch(range(4)):
            case.loss(model, case.batch(4, 0)).backward()
        model.eval()
        with torch.no_grad():
            case.loss(model, case.batch(4, 5))
        optimizer.step()
        assert not any(module.training for module in model.modules())
    assert attributor.step == 1


def test_a_copy_or_a_pickle_of_an_attached_model_is_free_of_it() -> None:
    model, optimizer, attributor = setting()
    twin = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    backward(model, attributor)
    class_losses(twin, vectors(4, 0)).mean().backward()  # outside of any batch, and nobody minds
    optimizer.step()
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    assert torch.equal(again(vectors(4, 0)[0]), twin(vectors(4, 0)[0]))
    for free in (twin, again, AveragedModel(model).module):
        anew = SGD(free.parameters(), lr=0.1)
        own = Attributor(free, anew, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean(), kernel="perexample")
        anew.zero_grad()
        backward(free, own)
        assert {call.how for call in own._kernels.calls} == {"fused", "formed"}  # as of a model of its own
        anew.step()


@pytest.mark.parametrize("kernel", ["tangent", "perexample", "ghost", "auto"])
@pytest.mark.parametrize("name", ["mlp", "convolutional", "gpt", "lstm"])
def test_two_attributors_on_one_model_do_not_disturb_each_other(name: str, kernel: Kernel) -> None:
    """Whichever of them could form gradients alone; and when the first has gone, the second can."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    targets = {"t": case.batch(3, 99)}
    first = Attributor(model, optimizer, targets, case.loss, scheme="first", kernel=kernel)
    for other in ("tangent", kernel):
        second = Attributor(model, optimizer, targets, case.loss, scheme="first", kernel=other)
        for step in range(2):
            g = per_example_gradients(model, case.parts(case.batch(4, step), 4))
            with first.batch(range(4)), second.batch(range(4)):
                case.loss(model, case.batch(4, step)).backward()
            q = reference_direction(model, optimizer, case.at(targets["t"]), "first", 1)
            optimizer.step()
            optimizer.zero_grad()
            for attributor in (first, second):
                assert attributor.last is not None
                found = attributor.last.values["t"]
                torch.testing.assert_close(found, contracted(model, g, q), rtol=1e-8, atol=1e-13)
        first.close()
        first = second
    with first.batch(range(4)):
        case.loss(model, case.batch(4, 5)).backward()
    if kernel in ("perexample", "ghost"):
        assert {call.how for call in first._kernels.calls} - {"tangent", "formed"}
    optimizer.step()


def test_buffers_that_a_forward_replaces_are_put_back() -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.average: Tensor
            self.register_buffer("average", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            self.average = 0.9 * self.average + 0.1 * y.detach().mean(dim=0)
            return y

    model = Averaging()
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean())
    assert torch.equal(model.average, torch.zeros(3))
    backward(model, attributor)
    average = 0.1 * model.layer(vectors(4, 0)[0]).mean(dim=0)
    optimizer.step()
    torch.testing.assert_close(model.average, average)


class Layout(Enum):
    BATCH_FIRST = 0
    TIME_FIRST = 1


class SwitchingByEnum(Switching):
    def forward(self, x_BT: Tensor, layout: Layout = Layout.BATCH_FIRST) -> Tensor:  # type: ignore[override]
        return super().forward(x_BT, layout.value)


class SwitchingByLength(Switching):
    def forward(self, x_BT: Tensor, layout: int = 0) -> Tensor:
        return super().forward(x_BT, int(x_BT.shape[1] > 5))


def test_a_merged_layout_may_hang_on_an_enum_or_on_the_length() -> None:
    def losses(model: nn.Module, batch_BT: Tensor) -> Tensor:
        logits = model(batch_BT[:, :-1], list(Layout)[int(batch_BT[0, -1]) % 2])
        return F.cross_entropy(logits.transpose(1, 2), batch_BT[:, 1:], reduction="none").mean(dim=1)

    check(Case(SwitchingByEnum, tokens, losses), [tokens(4, seed) for seed in range(6)])
    check(Case(SwitchingByLength, tokens, token_losses), [tokens(4, seed, 5 + 2 * (seed % 2)) for seed in range(4)])


class Flattened(nn.Module):
    """Drops a token inside and merges the rest: a number of entries that no input has, the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, x_BT: Tensor) -> Tensor:
        h = self.embedding(x_BT)[:, 1:]
        return torch.as_tensor(self.head(h.reshape(-1, 8))).reshape(*h.shape[:2], -1)


def test_rows_merged_after_a_slice_are_found() -> None:
    def losses(model: nn.Module, batch_BT: Tensor) -> Tensor:
        return F.cross_entropy(model(batch_BT).transpose(1, 2), batch_BT[:, 1:], reduction="none").mean(dim=1)

    check(Case(Flattened, tokens, losses), [tokens(4, 0), tokens(5, 1, length=5), tokens(3, 2)])


def test_buffers_that_a_target_alone_changes_do_not_leak_into_training() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.mean: Tensor | None
            self.seen: Tensor
            self.register_buffer("mean", None)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if self.mean is None:
                self.mean = torch.full((6,), 2.0 if self.training else 5.0)
            if len(x) > 6:
                self.seen.fill_(float(len(x)))
            y: Tensor = self.layer(x - self.mean) + self.seen
            return y

    def train(attach: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Caching()
        optimizer = SGD(model.parameters(), lr=0.1)
        targets = {"t": [vectors(3, 1), vectors(3, 2), vectors(8, 3)]}
        attributor = Attributor(model, optimizer, targets, lambda m, b: class_losses(m, b).mean()) if attach else None
        for step in range(5):
            with attributor.batch(range(4)) if attributor else nullcontext():
                class_losses(model, vectors(4, step)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.state_dict().values())

    assert all(torch.equal(x, y) for x, y in zip(train(True), train(False), strict=True))


def test_an_embedding_that_rewrites_itself_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4, max_norm=0.5), nn.Flatten(), nn.Linear(28, 3))
    with pytest.raises(InrunError, match=r"^0: an embedding with max_norm"):
        Attributor(model, SGD(model.parameters(), lr=0.1), {"t": tokens(3, 0)}, lambda m, b: m(b).mean())


@pytest.mark.parametrize("foreach", [False, True])
def test_nesterovs_foreach_step_writes_into_the_gradient_and_is_no_error(foreach: bool) -> None:
    kind = lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)  # noqa: E731
    check(CASES["mlp"], [vectors(4, seed) for seed in range(3)], kind)


class Queries(nn.Module):
    """A parameter of the model's own is the input of one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.layer, self.head = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(self.query.expand(len(x), -1)) * self.head(x))


def test_a_parameter_may_be_an_input() -> None:
    model = Queries()
    optimizer = AdamW(model.parameters())
    with Attributor(model, optimizer, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean(), audit_every=1) as a:
        with a.batch(range(4)):
            class_losses(model, vectors(4, 0)).mean().backward()
        optimizer.step()
    assert a.step == 1


def test_a_nan_in_the_first_of_two_batches_is_skipped() -> None:
    model, optimizer, attributor = setting(nonfinite="skip")
    backward(model, attributor, scale=float("nan"))
    backward(model, attributor)
    optimizer.step()
    assert attributor.last is not None
    assert attributor.last.skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_may_be_scaled_up_and_an_empty_parameter_may_be_there(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, dtype=dtype)))
    optimizer = SGD(model.parameters(), lr=0.1)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        return vectors(4, seed)[0].to(dtype), vectors(4, seed)[1]

    attributor = Attributor(model, optimizer, {"t": batch(1)}, lambda m, b: class_losses(m, b).mean())
    with attributor.batch(range(4)):
        class_losses(model, batch(0)).mean().backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(1.7)
    optimizer.step()
    assert attributor.step == 1
