"""Modules of plain torch that use a weight, rearrange the examples or hand out their result in every way there is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.models import GPT, VOCABULARY


class Text(nn.Module):
    """Tokens embedded, worked on by `body` ([batch, time, 8] to the same), and predicted."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(VOCABULARY, 8), body, nn.Linear(8, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        y = self.body(self.embedding(tokens_BT))
        logits: Tensor = self.head(y[0] if isinstance(y, tuple) else y)
        return logits


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.attention(x_BTD, x_BTD, x_BTD, need_weights=False)[0]
        return y


class Packed(nn.Module):
    """A GRU over sequences packed by their lengths, and classified by its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(VOCABULARY, 6), nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embedding(input_ids), attention_mask.sum(1), batch_first=True, enforce_sorted=False
        )
        y, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=input_ids.shape[1])
        logits: Tensor = self.head(y)
        return logits


class Cells(nn.Module):
    """A recurrent cell called once for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x_BTD: Tensor) -> Tensor:
        state, found = torch.zeros_like(x_BTD[:, 0]), []
        for x in x_BTD.unbind(1):
            state = self.cell(x, state)
            found.append(state)
        return torch.stack(found, dim=1)


class Scaled(nn.Module):
    """A bare parameter used beside modules that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.linear = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(x * self.scale) + self.shift)


class ClassToken(nn.Module):
    """A token of the model's own, put before the others of every example, as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x_BTD), -1, -1), x_BTD], dim=1)
        x = torch.tanh(self.layer(x))
        return x[:, 1:] + x[:, :1]


class TokenModule(nn.Module):
    """A module that puts out its parameter and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self) -> Tensor:
        return self.token


class TokenOfItsOwn(nn.Module):
    """The same, with the token from a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layer = TokenModule(), nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return torch.as_tensor(torch.tanh(self.layer(x_BTD + self.token())))


class Borrowing(nn.Module):
    """A module that reads another's weight, beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) + F.linear(torch.tanh(x), self.inner.weight.T))


class Uncalled(nn.Module):
    """A module that reads another's weight and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


class TransposedHead(nn.Module):
    """The embedding's weight read for the logits, as in many tied models written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(tokens_BT))) @ self.embedding.weight.T


class Functional(nn.Module):
    """A module run by functional_call with its own weights, scaled by a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.log_scale = nn.Linear(8, 8), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: p * self.log_scale.exp() for name, p in self.inner.named_parameters()}
        return torch.as_tensor(functional_call(self.inner, weights, (x,)))


class Generated(nn.Module):
    """The weights of a layer computed from the example itself (a hypernetwork)."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(8, 64)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return torch.tanh(x_BTD @ self.generator(x_BTD.mean(1)).view(-1, 8, 8))


@dataclass
class Result:
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Question:
    entries: Tensor
    scale: float = 1.0


class OnDataclasses(nn.Module):
    """A model that is asked by a dataclass and answers by one, frozen both, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.shift = Text(nn.Tanh()), nn.Parameter(torch.randn(VOCABULARY))

    def forward(self, asked: Question) -> Question:
        return Question(self.text(asked.entries) * asked.scale + self.shift, asked.scale)


class Wrapped(nn.Module):
    """A model that hands its logits out in another form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.form = GPT(width=8, layers=1), form

    def forward(self, tokens_BT: Tensor) -> Any:
        return self.form(self.model(tokens_BT))


class Inside(nn.Module):
    """A model that computes its loss in its forward: one number per example, or their mean."""

    def __init__(self, mean: bool = False) -> None:
        super().__init__()
        self.embedding, self.head, self.mean = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY), mean

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.head(torch.tanh(self.embedding(tokens_BT[:, :-1])))
        losses = F.cross_entropy(logits.transpose(1, 2), tokens_BT[:, 1:], reduction="none").mean(1)
        return (losses.mean() if self.mean else losses), logits


class Bags(nn.Module):
    """Bags of tokens, one per row."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(VOCABULARY, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(self.bag(tokens_BT))
        return logits


class FlatBags(Bags):
    """Bags of tokens, one after another in a single row of tokens, with the places where they begin."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        B, T = tokens_BT.shape
        logits: Tensor = self.head(self.bag(tokens_BT.flatten(), torch.arange(0, B * T, T)))
        return logits


class Frequent(nn.Module):
    """An embedding whose gradient is divided by how often the batch has the token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, scale_grad_by_freq=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(tokens_BT)))
        return logits


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.both = nn.Linear(6, 5), nn.Linear(6, 4), nn.Bilinear(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.both(torch.tanh(self.one(x)), torch.tanh(self.two(x)))
        return logits


class Routed(nn.Module):
    """Experts that get the tokens which a gate picked for them (the number of them depends on the values)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x_BTD: Tensor) -> Tensor:
        flat = x_BTD.flatten(0, 1)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        y = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            picked = (chosen == k).nonzero()[:, 0]
            y = y.index_add(0, picked, expert(flat[picked]) * weight[picked, None])
        return y.view_as(x_BTD)


class Mixing(nn.Module):
    """An example is compared with the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x_BTD - x_BTD.mean(dim=0)))


class Sorting(nn.Module):
    """The examples are sorted inside, and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor) -> Tensor:
        order = x_BTD.detach().sum((1, 2)).argsort()
        return torch.as_tensor(self.layer(x_BTD[order])[order.argsort()])


class MixingAtTheEnd(nn.Module):
    """The same, after the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.as_tensor(y - y.mean(dim=0))


class FunctionalBatchNorm(nn.Module):
    """Batch normalisation without a module of that name: by the batch's statistics in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 3)
        self.register_buffer("mean", torch.zeros(9))
        self.register_buffer("variance", torch.ones(9))
        self.mean: Tensor
        self.variance: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.first(x), self.mean, self.variance, training=self.training)
        logits: Tensor = self.second(torch.tanh(x))
        return logits


class Adaptive(nn.Module):
    """A softmax whose rare classes have layers of their own, called with the tokens that need them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(8, VOCABULARY, [10, 20], div_value=2.0)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, None]:
        x = torch.tanh(self.embedding(tokens_BT[:, :-1]))
        losses = -self.softmax(x.flatten(0, 1), tokens_BT[:, 1:].flatten()).output
        return losses.view(len(tokens_BT), -1).mean(1), None
