"""What is trained: models with random weights, made-up batches and targets, and the losses.

A batch is a pair (inputs, labels) with examples in the first dimension. Token ids follow Zipf's law, as text does, not
a uniform distribution: a batch has repeated tokens, and most of the vocabulary does not occur in it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.resnet import Norm, ResNet18, settle

Batch = tuple[Tensor, Tensor]
Dtype = Literal["fp32", "bf16"]
TARGET_SEED = 10**6  # of the first target; training batches have the seeds 0, 1, ...


class Workload(Protocol):
    """A model, its data and its loss."""

    @property
    def name(self) -> str: ...
    @property
    def batch(self) -> int:
        """Examples of a training batch, unless another number is asked for."""

    @property
    def target(self) -> int:
        """Examples of a target's batch."""

    @property
    def large(self) -> bool:
        """Whether there is room for one set of weights only, shared by all that is measured."""

    def build(self) -> nn.Module: ...
    def draw(self, examples: int, seed: int) -> Batch: ...
    def outputs(self, model: Callable[[Tensor], object], inputs: Tensor) -> Tensor:
        """What the loss is taken of: float32 [examples, ...]."""

    def each(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of every example: [examples]."""

    def size(self, examples: int) -> str:
        """The batch in words."""


@dataclass(frozen=True)
class Text:
    """A causal language model of transformers; an example is a sequence of `length` tokens, a target is one of them."""

    name: str
    model: Callable[[], nn.Module]
    vocabulary: int
    length: int
    batch: int
    large: bool = False
    target: int = 1

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model()

    def draw(self, examples: int, seed: int) -> Batch:
        rank = torch.arange(self.vocabulary, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(1 / (rank + 2.7), examples * self.length, replacement=True, generator=generator)
        ids_BT = drawn.view(examples, self.length)
        return ids_BT, ids_BT

    def outputs(self, model: Callable[[Tensor], object], inputs: Tensor) -> Tensor:
        logits: Tensor = model(inputs).logits  # type: ignore[attr-defined]
        return logits.float()

    def each(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over the tokens of an example."""
        losses = F.cross_entropy(outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return losses.view(len(labels), -1).mean(dim=1)

    def size(self, examples: int) -> str:
        return f"batch {examples} of {self.length} tokens"


@dataclass(frozen=True)
class Images:
    """A classifier; an example is a tensor of `shape` and one of ten classes, a target is a small batch of them."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    large: bool = False
    target: int = 8

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.model()
        settle(model, self.draw(32, TARGET_SEED - 1)[0])
        return model

    def draw(self, examples: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn((examples, *self.shape), generator=generator)
        return inputs, torch.randint(0, 10, (examples,), generator=generator)

    def outputs(self, model: Callable[[Tensor], object], inputs: Tensor) -> Tensor:
        logits = model(inputs)
        assert isinstance(logits, Tensor)
        return logits.float()

    def each(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none")

    def size(self, examples: int) -> str:
        return f"batch {examples} of {' x '.join(map(str, self.shape))}, targets of {self.target}"


def gpt2(width: int, layers: int, heads: int, vocabulary: int, length: int, tied: bool) -> nn.Module:
    """GPT-2's architecture, without dropout."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def pythia_410m() -> nn.Module:
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=2048, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0,
        eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def mlp(inner: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inner, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip


def resnet(norm: Norm, width: int = 64) -> Callable[[], nn.Module]:
    return lambda: ResNet18(norm, width=width)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Text("gpt14m", lambda: gpt2(384, 6, 6, 4096, 256, tied=False), 4096, 256, batch=8),
        Text("gpt2", lambda: gpt2(768, 12, 12, 50257, 512, tied=True), 50257, 512, batch=4),
        Text("pythia410m", pythia_410m, 50304, 128, batch=4, large=True),
        Images("resnet18", resnet("frozen-batch"), (3, 32, 32), batch=64),
        Images("resnet18-group", resnet("group"), (3, 32, 32), batch=64),
        Images("mlp", lambda: mlp(784, 1024), (784,), batch=64),
        # to try the suite itself
        Text("gpt-tiny", lambda: gpt2(16, 1, 2, 32, 8, tied=False), 32, 8, batch=3),
        Text("gpt-tiny-shared", lambda: gpt2(16, 1, 2, 32, 8, tied=True), 32, 8, batch=3, large=True),
        Images("mlp-tiny", lambda: mlp(6, 8), (6,), batch=4),
        Images("resnet-tiny", resnet("frozen-batch", width=4), (3, 8, 8), batch=4),
    )
}
NOTES = {
    "resnet18": "batch normalisation with fixed statistics: in training mode it has no gradient per example",
    "resnet18-group": "group normalisation in place of batch normalisation",
}


@dataclass(frozen=True)
class Setting:
    """A workload on a device, with a batch size and a precision."""

    workload: Workload
    batch: int
    dtype: Dtype
    device: str

    def build(self) -> nn.Module:
        return self.workload.build().to(self.device)

    def draw(self, examples: int, seed: int) -> Batch:
        inputs, labels = self.workload.draw(examples, seed)
        return inputs.to(self.device), labels.to(self.device)

    def targets(self, number: int) -> list[Batch]:
        """So many targets' batches."""
        return [self.draw(self.workload.target, TARGET_SEED + k) for k in range(number)]

    def losses(self, model: Callable[[Tensor], object], batch: Batch) -> Tensor:
        """The loss of every example of a batch: [examples]."""
        precision = torch.autocast(self.device.partition(":")[0], torch.bfloat16) if self.dtype == "bf16" else None
        with precision or contextlib.nullcontext():
            outputs = self.workload.outputs(model, batch[0])
        return self.workload.each(outputs, batch[1])

    def loss(self, model: Callable[[Tensor], object], batch: Batch) -> Tensor:
        """The mean loss of a batch: what is trained on, and what a target is."""
        return self.losses(model, batch).mean()
