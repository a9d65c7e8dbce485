"""What the zoo holds of an architecture, and the batches and losses that many of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tests.models import VOCABULARY, Case

Inputs = dict[str, Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FREEZE = r".*\(requires_grad_\(False\)\)"
MIXED = "cannot tell which rows of its output belong to which example" + FREEZE


@dataclass(frozen=True)
class Entry(Case):
    """An architecture: `examples` in a training batch, and what is expected of its values.

    `refused` is a regular expression of the error that refuses it, empty where the values agree with per-example
    autograd. `mixed`: no example has a gradient of its own; `told`: a warning says so. `single`: it has no double
    precision; `partly`: it computes something in single precision whatever its parameters are.
    """

    family: str
    examples: int = 5
    refused: str = ""
    mixed: str = ""
    told: bool = True
    single: bool = False
    partly: bool = False

    @property
    def verdict(self) -> str:
        return "own rows" if self.mixed else "refused" if self.refused else "agrees"


def hugging_face(kind: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
    """A builder of `AutoModelFor<head>` of this model type from a random configuration, without dropout."""

    def build() -> nn.Module:
        import transformers

        config = transformers.AutoConfig.for_model(kind, **settings)
        without_dropout(config)
        model: nn.Module = getattr(transformers, f"AutoModel{head and f'For{head}'}").from_config(config)
        return model.to(torch.get_default_dtype()).train()

    return build


def without_dropout(config: Any) -> None:
    """Set everything that drops something to zero, in the configurations inside too."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            without_dropout(value)
        elif ("drop" in name or "mask_time" in name or "mask_feature" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


def but(build: Callable[[], nn.Module], *frozen: str) -> Callable[[], nn.Module]:
    """The same model with the parameters frozen whose names hold one of these strings."""

    def built() -> nn.Module:
        model = build()
        names = [name for name, _ in model.named_parameters() if any(part in name for part in frozen)]
        assert names
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return built


class FrozenStatistics(nn.Module):
    """A model whose batch normalisations keep their statistics, as fine-tuning does it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> "FrozenStatistics":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def frozen_statistics(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: FrozenStatistics(build()).train()


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.get_default_dtype())


def words(n: int, length: int, generator: torch.Generator) -> Tensor:
    """Tokens without the special ones."""
    return torch.randint(3, VOCABULARY, (n, length), generator=generator)


def texts(n: int, seed: int, length: int = 8) -> Inputs:
    """Texts of one length."""
    return {"input_ids": words(n, length, generator_of(seed))}


def padded(n: int, seed: int, length: int = 8) -> Inputs:
    """Texts of several lengths, padded at the end."""
    generator = generator_of(seed)
    ids = words(n, length, generator)
    lengths = torch.randint(3, length + 1, (n, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def masked(n: int, seed: int) -> Inputs:
    """Padded texts, some tokens replaced by a mask (token 1), and the texts as they were as `labels`."""
    batch = padded(n, seed)
    hidden = torch.rand(batch["input_ids"].shape, generator=generator_of(seed + 1)) < 0.3
    ids = torch.where(hidden & batch["attention_mask"].bool(), 1, batch["input_ids"])
    return {**batch, "input_ids": ids, "labels": batch["input_ids"]}


def pairs(n: int, seed: int) -> Inputs:
    """Padded texts, and others to make of them."""
    return {**padded(n, seed), "labels": words(n, 7, generator_of(seed + 1))}


def pictures(n: int, seed: int, size: int = 16) -> Inputs:
    generator = generator_of(seed)
    return {
        "pixel_values": normal(generator, n, 3, size, size),
        "labels": torch.randint(0, 3, (n,), generator=generator),
    }


def mean_over_tokens(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean cross entropy of each example's unmasked tokens: [examples]."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    mask = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    return (losses * mask).sum(1) / mask.sum(1)


def next_tokens(model: nn.Module, batch: Inputs) -> Tensor:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    # `use_cache` is what training scripts turn off
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return mean_over_tokens(logits, ids[:, 1:], None if mask is None else mask[:, 1:])


def same_tokens(model: nn.Module, batch: Inputs) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return mean_over_tokens(logits, batch["labels"], batch["attention_mask"])


def other_text(model: nn.Module, batch: Inputs) -> Tensor:
    labels = batch["labels"]
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return mean_over_tokens(model(**inputs, decoder_input_ids=labels[:, :-1], use_cache=False).logits, labels[:, 1:])


def other_text_with_cache(model: nn.Module, batch: Inputs) -> Tensor:
    """With the keys and values kept that only generating text needs: the default of `transformers`."""
    labels = batch["labels"]
    return mean_over_tokens(model(batch["input_ids"], decoder_input_ids=labels[:, :-1]).logits, labels[:, 1:])


def classes(model: nn.Module, batch: Inputs) -> Tensor:
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    output = model(**inputs)
    return F.cross_entropy(output if isinstance(output, Tensor) else output.logits, batch["labels"], reduction="none")
