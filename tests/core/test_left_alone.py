"""Models that once went wrong: their values against per-example autograd, and their training with and without."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from inrun import Attributor, InrunError, MixedExamplesWarning
from inrun.oracle import per_example_gradients
from inrun.state import State, preserved_random_state
from tests.models import VOCABULARY, class_losses, vectors
from tests.reference import contracted, reference_direction

pytestmark = pytest.mark.usefixtures("float64")

Losses = Callable[[nn.Module, Any], Tensor]


def words(n: int, seed: int, length: int = 7) -> tuple[Tensor]:
    return (torch.randint(0, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed)),)


def next_words(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    logits, following = model(*batch)[:, :-1], batch[0][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return losses.view(len(following), -1).mean(1)


def agrees(
    build: Callable[[], nn.Module],
    steps: Sequence[Sequence[Any]],
    target: Any,
    losses: Losses = class_losses,
    kernel: Any = "tangent",
) -> None:
    """The values of these steps' batches (several of them are accumulated) are those of per-example autograd."""
    torch.manual_seed(0)
    model = build()
    optimizer, mode = AdamW(model.parameters(), lr=1e-2), model.training

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return losses(model, batch).mean()

    def parts(batch: Any, n: int) -> Callable[[nn.Module], Tensor]:
        return lambda model: losses(model, batch) / n

    def at_target(model: nn.Module) -> Tensor:
        return loss(model, target)

    with Attributor(model, optimizer, {"t": target}, loss, kernel=kernel) as attributor:
        for batches in steps:
            optimizer.zero_grad()
            with State(model).copied(), preserved_random_state(model):
                g = [per_example_gradients(model, parts(b, len(batches) * len(b[0]))) for b in batches]
            for batch in batches:
                with attributor.batch(range(len(batch[0]))):
                    (loss(model, batch) / len(batches)).backward()
            with State(model).copied(), preserved_random_state(model):
                q = reference_direction(model, optimizer, at_target, "path", 1)
            model.train(mode)
            optimizer.step()
            assert attributor.last is not None
            wanted = torch.cat([contracted(model, of, q) for of in g])
            torch.testing.assert_close(attributor.last.values["t"], wanted, rtol=1e-8, atol=1e-12)


def trained(build: Callable[[], nn.Module], batches: Sequence[Any], target: Any, losses: Losses) -> None:
    """Training with an Attributor attached is bit for bit that without it: weights, buffers, random state."""
    ends = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = build()
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return losses(model, batch).mean()

        attributor = Attributor(model, optimizer, {"t": target}, loss, kernel="tangent") if attached else None
        for batch in batches:
            optimizer.zero_grad()
            with attributor.batch(range(len(batch[0]))) if attributor else nullcontext():
                loss(model, batch).backward()
            optimizer.step()
        plain = {name: x for m in model.modules() for name, x in vars(m).items() if isinstance(x, int | float)}
        ends.append((model.state_dict(), torch.get_rng_state(), plain))
    (weights, random_state, plain), (others, other_state, other_plain) = ends
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert torch.equal(random_state, other_state)
    assert plain == other_plain


class Layers(nn.Module):
    """Two layers, for others to be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.between(self.first(x)))
        return logits

    def between(self, x: Tensor) -> Tensor:
        return x.tanh()


# --- what modules hold besides tensors


class Counting(Layers):
    """Something that fades in with the number of calls."""

    calls = 0

    def between(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x.tanh() * (1 - 0.5**self.calls)


class Drawing(Layers):
    """Dropout from a generator of its own."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def between(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if isinstance(self.generator, torch.Generator):
            return x * (torch.rand(x.shape, generator=self.generator) < 0.7)
        return x * float(self.generator.random())


@pytest.mark.parametrize(
    "build",
    [
        Counting,
        lambda: Drawing(torch.Generator().manual_seed(3)),
        lambda: Drawing(np.random.default_rng(3)),
        lambda: Drawing(np.random.RandomState(3)),
    ],
)
def test_counts_and_generators_of_modules_are_left_as_they_were(build: Callable[[], nn.Module]) -> None:
    trained(build, [vectors(5, seed) for seed in range(4)], vectors(3, 90), class_losses)


class Table(nn.Module):
    """Positions from a table that is made anew for longer texts, as rotary embeddings do it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.longest = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY), 0

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.longest:
            self.longest = ids.shape[1]
            self.table = torch.arange(8.0 * self.longest).view(-1, 8).cos()
        logits: Tensor = self.head(self.embedding(ids) * self.table[: ids.shape[1]])
        return logits


def test_a_table_and_the_length_that_it_was_made_for_go_together() -> None:
    batches = [words(5, 0, 4), words(5, 1, 6), words(5, 2, 9), words(3, 3, 2)]
    trained(Table, batches, words(3, 90, 8), next_words)


class Sharing(nn.Module):
    """Layers that hand on something in a dictionary that all of them hold."""

    def __init__(self, shared: dict[str, Tensor], first: bool) -> None:
        super().__init__()
        self.layer, self.shared, self.is_first = nn.Linear(6, 6), shared, first

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x).tanh()
        if self.is_first:
            self.shared["y"] = y
        return y + self.shared["y"]


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared: dict[str, Tensor] = {}
        self.layers = nn.Sequential(Sharing(shared, True), Sharing(shared, False))
        self.scale, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x * self.scale))
        return logits


def test_a_container_that_several_modules_hold_stays_one() -> None:
    trained(Together, [vectors(5, seed) for seed in range(3)], vectors(3, 90), class_losses)
    agrees(Together, [[vectors(5, seed)] for seed in range(2)], vectors(3, 90))


# --- examples that are mixed


class Normed(Layers):
    """Batch normalisation, or a mean of someone's own, and numbers drawn in the forward that have nothing to do with
    it.
    """

    def __init__(self, draws: str, own: bool = False) -> None:
        super().__init__()
        self.norm, self.draws, self.own = nn.BatchNorm1d(6), draws, own

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            if self.draws == "numpy":
                x = x * (1 + np.random.rand())
            if self.draws == "integers":
                x = x + torch.randint(0, 2, x.shape)
            if self.draws == "bernoulli":
                x = x * torch.bernoulli(torch.full_like(x, 0.9))
            if self.draws == "mixup":
                return x + x[torch.randperm(len(x))]
        y = x - x.mean(0) * self.training if self.own else self.norm(x)
        return torch.as_tensor(y).tanh()


class Noisy(Layers):
    """Numbers are drawn for every entry, and nothing is mixed."""

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.bernoulli(torch.full_like(x, 0.5)) + torch.randint(0, 2, x.shape)
            x = x + torch.as_tensor(np.random.rand(*x.shape))
        return x.tanh()


@pytest.mark.filterwarnings("ignore::inrun.MixedExamplesWarning")
@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(6), lambda: nn.InstanceNorm1d(6, track_running_stats=True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_running_statistics_are_those_of_training_alone(norm: Callable[[], nn.Module], frozen: bool) -> None:
    """torch writes them past the tensors' versions."""
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 6, 2), norm().requires_grad_(not frozen), nn.Flatten(), nn.Linear(12, 3))
        optimizer = SGD(model.parameters(), lr=0.1)
        x, y = torch.randn(4, 3, 3), torch.randint(3, (4,))
        settings: Any = {"scheme": "path", "kernel": "tangent"}
        targets = {"t": (x[:2], y[:2])}
        attributor = Attributor(model, optimizer, targets, lambda m, b: F.cross_entropy(m(b[0]), b[1]), **settings)
        if not attached:
            attributor.close()
        for _ in range(3):
            optimizer.zero_grad()
            with attributor.batch(range(4)) if attached else nullcontext():
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(model.state_dict())
    for name, was in found[0].items():
        assert torch.equal(was, found[1][name]), name


def is_told(model: nn.Module, batches: Sequence[Any], modes: Callable[[int], object] = lambda step: None) -> bool:
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attributor = Attributor(model, optimizer, {"t": vectors(3, 9)}, lambda m, b: class_losses(m, b).mean())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, batch in enumerate(batches):
            modes(step)
            optimizer.zero_grad()
            with attributor.batch(range(len(batch[0]))):
                class_losses(model, batch).mean().backward()
            optimizer.step()
    return any(w.category is MixedExamplesWarning for w in caught)


@pytest.mark.parametrize("examples", [2, 3, 5])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("draws", ["", "numpy", "integers", "bernoulli"])
def test_what_is_mixed_is_told_though_numbers_are_drawn(draws: str, own: bool, examples: int) -> None:
    torch.manual_seed(0)
    assert is_told(Normed(draws, own), [vectors(examples, 0)])


def test_mixing_in_a_random_order_is_told() -> None:
    torch.manual_seed(0)
    assert is_told(Normed("mixup"), [vectors(6, 0)])


@pytest.mark.parametrize("examples", [1, 2, 5])
def test_random_numbers_alone_are_not_taken_for_mixing(examples: int) -> None:
    torch.manual_seed(0)
    assert not is_told(Noisy(), [vectors(examples, 0), vectors(4, 1)])


def test_mixing_that_begins_in_mid_run_is_told() -> None:
    torch.manual_seed(0)
    model = Normed("")
    assert is_told(model, [vectors(5, 0), vectors(5, 1)], lambda step: model.norm.train(step > 0))
    model = Normed("")
    assert is_told(model, [vectors(5, 0), vectors(5, 1)], lambda step: model.train(step > 0))
    assert is_told(Normed("", own=True), [vectors(1, 0), vectors(5, 1)])  # one alone does not tell


# --- what is run again


class Head(nn.Module):
    """A head that reads the weight of an embedding with a padding row, or with gradients by frequency."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(VOCABULARY, 8, **settings), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.layer(self.embedding(ids)).tanh(), self.embedding.weight)


@pytest.mark.parametrize("settings", [{"padding_idx": 3}, {"padding_idx": -1}, {"scale_grad_by_freq": True}])
def test_a_lifted_embedding_has_the_gradient_that_it_has(settings: dict[str, Any]) -> None:
    agrees(lambda: Head(**settings), [[words(5, seed)] for seed in range(2)], words(3, 90), next_words)


class Late(nn.Module):
    """With a second input, a weight is read without a call of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.layer(self.embedding(ids)).tanh()
        if scale is not None:
            x = F.linear(x, self.layer.weight) * scale[:, None, None]
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("kernel", ["auto", "tangent"])
def test_what_is_lifted_in_the_middle_of_an_accumulation(kernel: str) -> None:
    steps = [[words(5, 0), (*words(4, 1, 6), torch.rand(4)), words(5, 2)], [(*words(5, 3), torch.rand(5)), words(1, 4)]]
    agrees(Late, steps, words(3, 90), next_words, kernel)


class WorkedOn(nn.Module):
    """Two outputs, of which one is worked on in place."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.block = nn.LSTM(6, 6, batch_first=True) if recurrent else Both()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, *others = self.block(x[:, None].expand(-1, 3, -1))
        y += 1
        logits: Tensor = self.head((y[:, -1] * (others[0][0][0] if isinstance(others[0], tuple) else 1)).tanh())
        return logits


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, self.layer.weight).sin()
        return self.other(y), y


@pytest.mark.parametrize("recurrent", [False, True])
def test_one_of_several_outputs_may_be_worked_on_in_place(recurrent: bool) -> None:
    agrees(lambda: WorkedOn(recurrent), [[vectors(5, seed)] for seed in range(2)], vectors(3, 90))


class InPlace(nn.Module):
    """Writes to the tensor that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.scale).sin_()


class Hidden(nn.Module):
    """Puts out an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(x=x * self.scale)


class Around(Layers):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def between(self, x: Tensor) -> Tensor:
        y = self.inner(x + 1)
        return torch.as_tensor(y if isinstance(y, Tensor) else y.x).tanh()


@pytest.mark.parametrize("inner", [InPlace, Hidden])
def test_what_cannot_be_run_again_by_itself_goes_to_the_module_around_it(inner: Callable[[], nn.Module]) -> None:
    agrees(lambda: Around(inner()), [[vectors(5, seed)] for seed in range(2)], vectors(3, 90))


def test_a_model_that_hides_what_it_puts_out_is_told() -> None:
    model = Hidden()
    attributor = Attributor(model, SGD(model.parameters(), 0.1), {"t": vectors(3, 9)}, lambda m, b: m(b[0]).x.sum())
    with pytest.raises(InrunError, match=r"^Hidden: .* cannot be seen \(SimpleNamespace\)"), attributor.batch(range(4)):
        model(vectors(4, 0)[0]).x.sum().backward()


class Random(Layers):
    """Draws numbers in whatever mode it is, for batches larger than the target's."""

    def between(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            x = F.dropout(x, 0.3) + torch.randn_like(x) * torch.randint(1, 3, x.shape[:1])[:, None]
        return F.linear(x, self.first.weight)


@pytest.mark.parametrize("training", [True, False])
def test_numbers_may_be_drawn_in_eval_mode_too(training: bool) -> None:
    agrees(lambda: Random().train(training), [[vectors(5, seed)] for seed in range(2)], vectors(3, 90))


class Repeated(nn.Module):
    """One block, several times in its list of layers, and a weight that is read where it is not called."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.layers, self.head = nn.ModuleList([block] * 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(F.linear(x, self.layers[0][0].weight))  # type: ignore[index]
        return logits


def test_a_module_that_stands_in_several_places_keeps_its_parameters() -> None:
    batches = [vectors(5, seed) for seed in range(3)]
    trained(Repeated, batches, vectors(3, 90), class_losses)
    agrees(Repeated, [[batch] for batch in batches], vectors(3, 90))
    model = Repeated()
    with Attributor(
        model, SGD(model.parameters(), lr=0.1), {"t": batches[0]}, lambda m, b: class_losses(m, b).mean()
    ) as attributor:
        parameters = dict(model.named_parameters())
        with attributor.batch(range(5)):
            class_losses(model, batches[0]).mean().backward()
        attributor.optimizers[0].step()
        assert all(p is parameters[name] for name, p in model.named_parameters())


def hooked() -> nn.Module:
    inner = InPlace()
    inner.forward = lambda x: x * inner.scale  # type: ignore[method-assign]
    inner.register_forward_pre_hook(lambda module, args: (args[0] * 1.5 + 1,))
    inner.register_forward_hook(lambda module, args, output: 2 * output + 1)
    return Around(inner)


def test_what_hooks_make_of_arguments_and_outputs_is_made_once() -> None:
    agrees(hooked, [[vectors(5, seed)] for seed in range(2)], vectors(3, 90))


class Scaling(Layers):
    """Writes to the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9))


def test_a_target_that_is_written_to_is_told() -> None:
    model = Scaling()
    with pytest.raises(InrunError, match=r"^target 't': .* writes to the batch in place"):
        Attributor(model, SGD(model.parameters(), 0.1), {"t": vectors(3, 9)}, lambda m, b: class_losses(m, b).mean())


class Momentum(Layers):
    """A second encoder, which follows the first by steps that the forward makes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.second, self.way = nn.Linear(6, 6).requires_grad_(False), way

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.way == "always":
            with torch.no_grad():
                for p, q in zip(self.second.parameters(), self.first.parameters(), strict=True):
                    if self.way == "data":
                        p.data = 0.9 * p.data + 0.1 * q.data
                    else:
                        p.data.mul_(0.9).add_(q, alpha=0.1)
        logits: Tensor = self.last(self.first(x).tanh() + self.second(x).tanh())
        if self.way == "again":
            logits = logits + F.linear(x, self.last.weight)
        return logits


@pytest.mark.parametrize("way", ["data", "in place"])
def test_parameters_that_the_forward_moves_are_moved_once_a_step(way: str) -> None:
    trained(lambda: Momentum(way), [vectors(5, seed) for seed in range(3)], vectors(3, 90), class_losses)


@pytest.mark.parametrize("way", ["always", "again"])
def test_a_forward_that_moves_parameters_where_it_is_run_more_often_is_told(way: str) -> None:
    with pytest.raises(InrunError, match=r"^second\.weight: the model's forward writes to this parameter"):
        trained(lambda: Momentum(way), [vectors(5, 0)], vectors(3, 90), class_losses)


class Batchless(nn.Module):
    """Layers whose weights are the output of a module for no example in particular, and are not to be expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(12)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.linear(x, layer(torch.eye(6))).tanh()
        logits: Tensor = self.head(x)
        return logits


def test_layers_that_are_alike_are_looked_at_together() -> None:
    model, calls = Batchless(), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    with Attributor(
        model, SGD(model.parameters(), 0.1), {"t": vectors(3, 9)}, lambda m, b: class_losses(m, b).mean()
    ) as attributor:
        calls = 0
        with attributor.batch(range(5)):
            class_losses(model, vectors(5, 0)).mean().backward()
        assert calls <= 15
        attributor.optimizers[0].step()


class Watching(Layers):
    """Installs a hook in its first forward, and remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def between(self, x: Tensor) -> Tensor:
        if not getattr(self, "installed", False):
            self.first.register_forward_hook(self.see)
            self.installed = True
        self.seen = sum(hook == self.see for hook in self.first._forward_hooks.values())
        return F.linear(x, self.first.weight) * self.seen

    def see(self, *_: Any) -> None:
        """It stands for one that collects outputs."""


def test_hooks_that_a_forward_installs_are_installed_once() -> None:
    batches = [vectors(5, seed) for seed in range(3)]
    trained(Watching, batches, vectors(3, 90), class_losses)


# --- what is refused, though people train it: each test is of a model that should be valued one day


class Auxiliary(Layers):
    """A second head that is there in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        logits: Tensor = self.last(y)
        return logits + 0.3 * self.other(y) if self.training else logits


class Chunks(nn.Module):
    """Longer texts are cut into pieces, which stand in the batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = x if ids.shape[1] <= 4 else x.reshape(-1, 4, 8)
        logits: Tensor = self.head(self.layer(y).tanh().view(x.shape))
        return logits


class Stash(nn.Module):
    """Computes something of its weight that is used elsewhere, not by its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        self.squared = self.weight.square()
        return x


class Stashing(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.stash = Stash()

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.stash(x) * self.stash.squared
        return y.tanh()


class Listed(Layers):
    """A weight that is reached by a plain list, where it cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.first.weight]

    def between(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[0]).tanh()


@pytest.mark.xfail(strict=True, raises=InrunError, reason="rows are found in eval mode, in which it is not called")
def test_a_head_that_is_there_in_training_only() -> None:
    agrees(Auxiliary, [[vectors(5, 0)]], vectors(3, 90))


@pytest.mark.xfail(strict=True, raises=InrunError, reason="what was found for one length is used for all")
def test_a_layout_that_hangs_on_the_length() -> None:
    agrees(Chunks, [[words(5, 0, 4)], [words(5, 1, 8)]], words(3, 90, 4), next_words)


@pytest.mark.xfail(strict=True, raises=InrunError, reason="the use is seen, but not that it leaves by an attribute")
def test_what_leaves_a_module_by_an_attribute() -> None:
    agrees(Stashing, [[vectors(5, 0)]], vectors(3, 90))


@pytest.mark.xfail(strict=True, raises=InrunError, reason="functional_call puts nothing in a list")
def test_a_weight_in_a_plain_list() -> None:
    agrees(Listed, [[vectors(5, 0)]], vectors(3, 90))
