"""Activation checkpointing, which runs parts of the forward pass again inside the backward pass: both of its kinds."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from inrun import Attributor, InrunError
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import CASES, GPT, VOCABULARY, Case, hugging_face_gpt2, token_losses, tokens
from tests.reference import contracted, reference_direction

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


class Checkpointed(GPT):
    """nanoGPT's GPT with every block checkpointed, in train mode."""

    def __init__(self, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.reentrant = reentrant

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.drop(self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1])))
        for block in self.h:
            run = partial(checkpoint, block, use_reentrant=self.reentrant) if self.training else block
            x = run(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


class Shared(nn.Module):
    """One block that is checkpointed three times over, with a position table of its own inside."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(VOCABULARY, 8), nn.Embedding(6, 8)
        self.block, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, VOCABULARY)
        self.scale, self.reentrant = nn.Parameter(torch.ones(VOCABULARY)), reentrant

    def part(self, x: Tensor) -> Tensor:
        placed = x + self.place(torch.arange(x.shape[1]))
        return torch.tanh(torch.as_tensor(self.block(self.norm(placed))))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for _ in range(3):
            x = checkpoint(self.part, x, use_reentrant=self.reentrant) if self.training else self.part(x)
        return torch.mul(self.head(x), self.scale)


def hugging_face(reentrant: bool) -> nn.Module:
    model = hugging_face_gpt2()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    return model


BUILDS: dict[str, Any] = {"gpt": Checkpointed, "shared": Shared, "hugging-face-gpt2": hugging_face}


@pytest.mark.parametrize("kernel", ["tangent", "perexample"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", BUILDS)
def test_values_are_the_oracles(name: str, reentrant: bool, kernel: Kernel) -> None:
    case = Case(partial(BUILDS[name], reentrant), tokens, token_losses)
    torch.manual_seed(0)
    model = case.build().train()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    target = case.batch(3, 90)
    with Attributor(model, optimizer, {"t": target}, case.loss, kernel=kernel) as attributor:
        for step in range(2):
            model.eval()
            batches = [case.batch(n, 10 * step + n) for n in (4, 2)]
            parts = [per_example_gradients(model, case.parts(b, 2 * len(b))) for b in batches]
            g = {n: torch.cat([part[n] for part in parts]) for n in parts[0]}
            model.train()
            optimizer.zero_grad()
            for batch in batches:
                with attributor.batch(range(len(batch))):
                    (case.loss(model, batch) / 2).backward()
            q = reference_direction(model, optimizer, case.at(target), "path", 1)
            optimizer.step()
            wanted = contracted(model, g, q)
            assert attributor.last is not None
            error = (attributor.last.values["t"] - wanted).abs().max() / wanted.abs().max()
            assert float(error) < 1e-9


@pytest.mark.parametrize("kernel", ["perexample", "ghost"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_first_under_sgd(reentrant: bool, kernel: Kernel) -> None:
    case = Case(partial(Checkpointed, reentrant), tokens, token_losses)
    torch.manual_seed(0)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    target, batch = case.batch(3, 90), case.batch(4, 1)
    g = per_example_gradients(model.eval(), case.parts(batch, 4))
    model.train()
    with Attributor(model, optimizer, {"t": target}, case.loss, scheme="first", kernel=kernel) as attributor:
        with attributor.batch(range(4)):
            case.loss(model, batch).backward()
        q = reference_direction(model, optimizer, case.at(target), "first", 1)
        optimizer.step()
    wanted = contracted(model, g, q)
    assert attributor.last is not None
    torch.testing.assert_close(attributor.last.values["t"], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", ["tangent", "perexample", "ghost"])
def test_a_whole_model_that_is_checkpointed(kernel: Kernel) -> None:
    """The target's gradient is taken inside of it, under `first` with SGD, and is none of its business."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    target, batch = case.batch(3, 90), case.batch(4, 1)
    g = per_example_gradients(model, case.parts(batch, 4))
    with Attributor(model, optimizer, {"t": target}, case.loss, scheme="first", kernel=kernel) as attributor:
        with attributor.batch(range(4)):
            case.loss(partial(checkpoint, model, use_reentrant=False), batch).backward()  # type: ignore[arg-type]
        q = reference_direction(model, optimizer, case.at(target), "first", 1)
        optimizer.step()
    assert attributor.last is not None
    torch.testing.assert_close(attributor.last.values["t"], contracted(model, g, q), rtol=1e-9, atol=1e-12)


class TwoLayouts(nn.Module):
    """One layer, in one checkpointed part, first for every example's tokens and then for positions, which have none."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.head, self.positions = nn.Linear(8, VOCABULARY), positions
        self.place: Tensor
        self.register_buffer("place", torch.randn(positions, 8))

    def part(self, x: Tensor) -> Tensor:
        first, tokens = torch.tanh(self.block(x[:, 0])), torch.tanh(self.block(x))
        places = torch.as_tensor(self.block(self.place))
        return tokens + places if self.positions == x.shape[1] else (tokens + first[:, None]) * places.mean()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        x = checkpoint(self.part, x, use_reentrant=False) if self.training else self.part(x)
        return torch.as_tensor(self.head(x))


@pytest.mark.parametrize("kernel", ["tangent", "perexample", "auto"])
def test_a_unit_whose_calls_are_laid_out_otherwise_each_time(kernel: Kernel) -> None:
    for positions, told in ((6, True), (4, False)):
        case = Case(partial(TwoLayouts, positions), tokens, token_losses)
        torch.manual_seed(0)
        model = case.build()
        optimizer = AdamW(model.parameters(), lr=1e-3)
        target, batch = case.batch(3, 90), case.batch(4, 1)
        g = per_example_gradients(model.eval(), case.parts(batch, 4))
        model.train()
        with Attributor(model, optimizer, {"t": target}, case.loss, kernel=kernel) as attributor:
            if not told:  # as many positions as examples
                with pytest.raises(InrunError, match="block is called several times"), attributor.batch(range(4)):
                    case.loss(model, batch).backward()
                continue
            with attributor.batch(range(4)):
                case.loss(model, batch).backward()
            q = reference_direction(model, optimizer, case.at(target), "path", 1)
            optimizer.step()
        assert attributor.last is not None
        torch.testing.assert_close(attributor.last.values["t"], contracted(model, g, q), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_is_what_it_is_without(reentrant: bool) -> None:
    """Bit for bit, dropout and all."""
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(reentrant, dropout=0.2)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        attributor = None
        if attached:
            target = {"t": tokens(2, 9)}
            attributor = Attributor(model, optimizer, target, CASES["gpt"].loss, kernel="tangent")
        for step in range(4):
            batch = tokens(4, step)
            if attributor is None:
                CASES["gpt"].loss(model, batch).backward()
            else:
                with attributor.batch(range(4)):
                    CASES["gpt"].loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


class Large(nn.Module):
    """Sixteen layers whose activations are much larger than their weights."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layers, self.checkpointed = nn.ModuleList(nn.Linear(64, 64) for _ in range(16)), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed and self.training:
                x = checkpoint(lambda y, layer=layer: torch.tanh(layer(torch.tanh(y) * 2)), x, use_reentrant=False)
            else:
                x = torch.tanh(layer(torch.tanh(x) * 2))
        return x


def test_what_it_saves_stays_saved() -> None:
    """With gradients formed in the backward pass, no layer's input outlives the forward pass."""
    model = Large(checkpointed=True)
    alive: list[Any] = []
    torch.manual_seed(0)
    x = torch.randn(4, 512, 64)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Attributor(
        model, optimizer, {"t": x[:1]}, lambda m, b: m(b).square().mean(), kernel="perexample"
    ) as attributor:
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda module, args: alive.append(args[0].untyped_storage()._weak_ref()))
        with attributor.batch(range(4)):
            loss = model(x).square().mean()
            dead = [torch.UntypedStorage._expired(reference) for reference in alive[-16:]]
            loss.backward()
        optimizer.step()
    assert all(dead)
