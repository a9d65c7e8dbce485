"""Token values against a slow truth: every unit's output is replaced by one in which all rows but one token's stand
still, and the gradient of the weights through that token's rows is autograd's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor, InrunError
from inrun.rows import Rows
from inrun.timeline import Time, find_time
from tests.models import CASES, GPT, VOCABULARY, Case, token_losses, tokens
from tests.reference import reference_direction

pytestmark = pytest.mark.usefixtures("float64")

# a mask [examples, time] as a unit's output has its rows; an output without examples is expanded by it
Layout = Callable[[Tensor], Tensor]
BATCH_TIME: Layout = lambda m_BT: m_BT[..., None]  # noqa: E731
MERGED: Layout = lambda m_BT: m_BT.reshape(-1, 1)  # noqa: E731
TIME_BATCH: Layout = lambda m_BT: m_BT.T[..., None]  # noqa: E731


@contextmanager
def one_token(model: nn.Module, layouts: Mapping[str, Layout], mask_BT: Tensor) -> Iterator[None]:
    """Gradients reach the weights of every unit through the rows of these tokens alone."""
    running: set[nn.Module] = set()

    def hook(layout: Layout, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module in running:
            return None
        running.add(module)
        still = {n: p.detach() for n, p in module.named_parameters(recurse=False)}
        other = functional_call(module, still, args, kwargs, tie_weights=False)
        running.remove(module)
        if isinstance(output, tuple):
            return torch.where(layout(mask_BT), output[0], other[0]), output[1]
        return torch.where(layout(mask_BT), output, other)

    handles = [
        module.register_forward_hook(partial(hook, layouts.get(name, BATCH_TIME)), with_kwargs=True)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def slow_values(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    loss: Callable[[], Tensor],
    q: Mapping[nn.Parameter, Tensor],
    examples: int,
    time: int,
) -> Tensor:
    """<g_it, q>, [examples, time]."""
    found = torch.zeros(examples, time)
    for i in range(examples):
        for t in range(time):
            mask_BT = torch.zeros(examples, time, dtype=torch.bool)
            mask_BT[i, t] = True
            with one_token(model, layouts, mask_BT):
                g = torch.autograd.grad(loss(), list(q), allow_unused=True)
            found[i, t] = sum(float((x * v).sum()) for x, v in zip(g, q.values(), strict=True) if x is not None)
    return found


def small_gpt() -> nn.Module:
    return GPT(width=8, positions=12)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Layout]]] = {
    "gpt": (small_gpt, {}),  # wpe's output is [T, d]
    "repeated": (CASES["repeated"].build, {"merged": MERGED}),
    "lstm": (CASES["lstm"].build, {"embedding": TIME_BATCH, "lstm": TIME_BATCH, "head": TIME_BATCH}),
    "hugging-face-gpt2": (CASES["hugging-face-gpt2"].build, {}),
}
OPTIMIZERS: dict[str, tuple[Literal["first", "path"], Callable[[Any], Optimizer]]] = {
    "sgd": ("first", lambda p: SGD(p, lr=0.1)),
    "adamw": ("path", lambda p: AdamW(p, lr=1e-2, weight_decay=0.1)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_token_values_are_the_slow_truth(name: str, kind: str) -> None:
    """The second of two steps; of the first model, eight examples of eight tokens of eight features."""
    build, layouts = MODELS[name]
    scheme, optimizer_of = OPTIMIZERS[kind]
    examples = time = 8 if name == "gpt" else 3
    case = Case(build, lambda n, seed: tokens(n, seed, length=time + 1), token_losses)
    torch.manual_seed(0)
    model = case.build()
    optimizer = optimizer_of(model.parameters())
    target = case.batch(3, 90)
    with Attributor(model, optimizer, {"t": target}, case.loss, scheme=scheme, token_values=True) as attributor:
        for step in range(2):
            batch = case.batch(examples, step)
            optimizer.zero_grad()
            with attributor.batch(range(examples)):
                case.loss(model, batch).backward()
            q = reference_direction(model, optimizer, case.at(target), scheme, 1)
            wanted = slow_values(model, layouts, lambda: case.loss(model, batch), q, examples, time) if step else None  # noqa: B023
            optimizer.step()
        last = attributor.last
    assert last is not None
    assert wanted is not None
    found = last.token_values["t"]
    assert found.dtype == torch.float64
    assert found.shape == (examples, time)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-9
    torch.testing.assert_close(found.sum(dim=1), last.values["t"], rtol=1e-12, atol=1e-16)


def test_values_are_what_they_are_without() -> None:
    """Token values take the values apart and leave them as they are; batches of other lengths are followed by zeros."""
    case = CASES["gpt"]
    found = []
    for token_values in (False, True):
        torch.manual_seed(0)
        model = case.build()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        target = {"a": case.batch(3, 90), "b": case.batch(2, 91)}
        with Attributor(model, optimizer, target, case.loss, token_values=token_values) as attributor:
            for step in range(2):
                optimizer.zero_grad()
                for n, length in ((4, 7), (3, 5), (2, 9)):
                    with attributor.batch(range(n)):
                        (case.loss(model, tokens(n, 10 * step + n, length)) / 3).backward()
                optimizer.step()
            assert attributor.last is not None
            found.append(attributor.last)
    plain, by_token = found
    assert plain.token_values == {}
    for target_name, values in plain.values.items():
        torch.testing.assert_close(by_token.values[target_name], values, rtol=1e-9, atol=1e-14)
        of_tokens = by_token.token_values[target_name]
        assert of_tokens.shape == (9, 8)
        torch.testing.assert_close(of_tokens.sum(dim=1), values, rtol=1e-9, atol=1e-14)
        assert not bool(of_tokens[:4, 6:].any())
        assert not bool(of_tokens[4:7, 4:].any())
        assert bool((of_tokens[7:] != 0).all())


def attributed(model: nn.Module, batch: Any, **settings: Any) -> tuple[Attributor, Optimizer]:
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": batch}, CASES["gpt"].loss, **{"token_values": True, **settings})
    with attributor.batch(range(len(batch))):
        CASES["gpt"].loss(model, batch).backward()
    return attributor, optimizer


class TimeFirst(nn.Module):
    """The recurrent model, called with [time, batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CASES["lstm"].build()

    def forward(self, tokens_TB: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(tokens_TB.T))


def test_another_batch_dimension() -> None:
    """Four examples of four tokens, either way."""
    found = []
    for batch_dim in (0, 1):
        torch.manual_seed(0)
        model = TimeFirst()
        called = model if batch_dim else model.inner
        optimizer = SGD(model.parameters(), lr=0.1)
        target, batch = {"t": tokens(3, 90)}, tokens(4, 1, length=5)

        def loss(m: nn.Module, batch_BT: Tensor, batch_dim: int = batch_dim) -> Tensor:
            x = batch_BT[:, :-1]
            logits = m(x.T if batch_dim else x)
            return nn.functional.cross_entropy(logits.transpose(1, 2), batch_BT[:, 1:])

        with Attributor(called, optimizer, target, loss, token_values=True, batch_dim=batch_dim) as attributor:
            with attributor.batch(range(4)):
                loss(called, batch).backward()
            optimizer.step()
        assert attributor.last is not None
        found.append(attributor.last.token_values["t"])
    assert found[0].shape == (4, 4)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


class Custom(Function):
    """x * w, without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.tanh(x * w)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        b = b * (1 - torch.tanh(x * w) ** 2)
        return b * w, (b * x).sum(dim=(0, 1))


class Once(Custom):
    backward = staticmethod(once_differentiable(Custom.backward))  # type: ignore[assignment]


class Scaled(nn.Module):
    def __init__(self, function: type[Custom]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.function.apply(x, self.weight))


def with_custom(function: type[Custom]) -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), Scaled(function), nn.Linear(8, VOCABULARY))


def test_a_unit_without_forward_mode_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    model, batch = with_custom(Custom), tokens(4, 1, length=5)
    attributor, optimizer = attributed(model, batch, scheme="first")
    loss = CASES["gpt"].at(batch)
    q = reference_direction(model, optimizer, loss, "first", 1)
    wanted = slow_values(model, {}, lambda: loss(model), q, 4, 4)
    optimizer.step()
    assert attributor.last is not None
    torch.testing.assert_close(attributor.last.token_values["t"], wanted, rtol=1e-9, atol=1e-14)


def test_a_unit_that_cannot_be_differentiated_twice_is_refused() -> None:
    torch.manual_seed(0)
    _, optimizer = attributed(with_custom(Once), tokens(4, 1, length=5))
    with pytest.raises(InrunError, match=r"Scaled.*neither a forward-mode derivative nor a backward pass"):
        optimizer.step()


class Pooled(nn.Module):
    """Has one output a sequence from its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT).cumsum(dim=1)
        logits: Tensor = self.head(x[:, -1])
        return logits[:, None].expand(*tokens_BT.shape, -1)


class LooksAhead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        return torch.as_tensor(self.head(x + x.mean(dim=1, keepdim=True)))


class Fixed(LooksAhead):
    """For sequences of four tokens only."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.embedding(tokens_BT).view(len(tokens_BT), 4, 8)))


class Regrouped(LooksAhead):
    """Cuts the batch into fours, whatever its length."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.embedding(tokens_BT).view(-1, 4, 8)))


class Pairs(LooksAhead):
    """A unit whose output is for pairs of tokens."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        return torch.as_tensor(self.head(x[:, :, None] - x[:, None, :]).mean(dim=2))


class Summary(LooksAhead):
    """Two more entries than there are tokens."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.as_tensor(self.head(nn.functional.pad(self.embedding(tokens_BT), (0, 0, 2, 0)))[:, 2:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Pooled, r"^head: its output of shape \(4, 31\) has no dimension of time"),
        (LooksAhead, r"^head: without the last tokens its output is another.*no token sees a later one"),
        (Fixed, r"could not be run on 2 tokens in place of 4.*sequences of any length"),
        (Regrouped, r"^head: its output of shape \(4, 4, 31\) for 4 tokens is laid out otherwise for 2"),
        (Pairs, r"^head: cannot tell which dimension of its output is time.*pairs"),
        (Summary, r"^head: cannot tell which entries of its output belong to which token"),
    ],
)
def test_what_has_no_token_values_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(InrunError, match=message):
        attributed(build(), tokens(4, 1, length=5))


def test_settings_that_do_not_go_together_are_refused() -> None:
    batch = tokens(4, 1, length=5)
    for kernel in ("perexample", "ghost"):
        with pytest.raises(InrunError, match=f"kernel='{kernel}' has no values of tokens"):
            attributed(CASES["gpt"].build(), batch, kernel=kernel, scheme="first")
    with pytest.raises(InrunError, match="momentum='credit' has no values of tokens"):
        attributed(CASES["gpt"].build(), batch, momentum="credit")
    with pytest.raises(InrunError, match="this first batch has one: begin with a longer one"):
        attributed(CASES["gpt"].build(), tokens(4, 1, length=2))


def test_time_is_found_by_what_shrank() -> None:
    """[4, 4, 4] of four examples of four tokens; merged with the examples, before and after another dimension."""
    x = torch.randn(4, 4, 4)
    assert find_time(x, x[:, :-1], Rows(3, 0), 4, (4, 3), None, "unit") == Time(1)
    assert find_time(x, x[..., :2], Rows(3, 0), 4, (4, 2), None, "unit") == Time(2)
    assert find_time(x, x[:-1], Rows(3, 2), 4, (4, 3), None, "unit") == Time(1)
    assert find_time(x, x, Rows(3, 0), 4, (4, 2), None, "unit") is None
    y = torch.randn(4, 3, 5, 2)  # examples, time, heads, features
    merged = Rows(2, 0, merged=True)
    inner, outer = y.transpose(1, 2), y
    for whole, time in ((outer, Time(0)), (inner, Time(0, outer=False))):
        less = whole.index_select(1 if whole is outer else 2, torch.tensor([0, 1]))
        flat = whole.reshape(-1, 2)
        assert find_time(flat, less.reshape(-1, 2), merged, 4, (3, 2), None, "unit") == time
        torch.testing.assert_close(time.per_token(flat, merged, 4, 3), y.flatten(2))
    with pytest.raises(InrunError, match=r"unit: its output merges time.*order"):
        find_time(torch.zeros(60, 2), torch.zeros(40, 2), merged, 4, (3, 2), None, "unit")
    with pytest.raises(InrunError, match=r"unit: without the last tokens its output is another"):
        find_time(x, x[:, 1:], Rows(3, 0), 4, (4, 3), None, "unit")
    with pytest.raises(InrunError, match=r"unit: cannot tell which entries.*whole number for every token"):
        find_time(x[:, :2], x[:, :1], Rows(3, 0), 4, (4, 2), None, "unit")


def test_where_documents_are_packed_those_left_whole_tell() -> None:
    """Of two sequences without their last two tokens: the second's first document is cut."""
    documents = torch.tensor([[0, 0, 1, 1], [2, 3, 3, 3]])
    x = torch.randn(2, 4, 3)
    y = x[:, :2].clone()
    for place, told in (((1, 1), True), ((1, 0), False), ((0, 1), False)):
        other = y.clone()
        other[place] += 1.0
        if told:
            assert find_time(x, other, Rows(3, 0), 2, (4, 2), documents, "unit") == Time(1)
        else:
            with pytest.raises(InrunError, match="without the last tokens"):
                find_time(x, other, Rows(3, 0), 2, (4, 2), documents, "unit")
    with pytest.raises(InrunError, match="without the last tokens"):  # no document was left whole: nothing is told
        find_time(x, y + 1.0, Rows(3, 0), 2, (4, 2), torch.zeros(2, 4, dtype=torch.long), "unit")
