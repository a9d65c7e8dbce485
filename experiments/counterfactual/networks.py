"""The models: all make logits [B, classes] or [B, T, vocabulary], and go through torch.func's vmap and grad."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.counterfactual.config import Model
from experiments.facts import training as facts
from experiments.replay.training import CLASSES, FEATURES

HEADS = 4


class Block(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.taken, self.given = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("later", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)
        self.later: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        split = (*x.shape[:2], HEADS, -1)
        query, key, value = (part.reshape(split).transpose(1, 2) for part in self.taken(self.before(x)).chunk(3, -1))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        mixed = scores.masked_fill(self.later, float("-inf")).softmax(-1) @ value
        x = x + self.given(mixed.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.after(x))))
        return found


class Gpt(nn.Module):
    """A plain one, of tokens [B, T]."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.tokens = nn.Embedding(model.vocabulary, model.width)
        self.positions = nn.Parameter(0.02 * torch.randn(model.length, model.width))
        self.blocks = nn.Sequential(*(Block(model.width, model.length) for _ in range(model.layers)))
        self.norm = nn.LayerNorm(model.width)
        self.head = nn.Linear(model.width, model.vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))
        return found


class Lora(nn.Module):
    """Hugging Face's language model with LoRA. Attention is by its plain kernel, for vmap and double backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            found: Tensor = self.inner(input_ids=tokens, use_cache=False).logits
        return found


def network(model: Model, seed: int) -> nn.Module:
    """With the weights that a seed begins with; of "lora" there is one in a process, whose adapters are made anew."""
    if model.kind == "lora":
        lora = lora_of(model.pretrained, model.width, model.vocabulary)
        torch.manual_seed(seed)
        for module in lora.modules():
            if hasattr(module, "reset_lora_parameters"):
                reset: Any = module.reset_lora_parameters
                reset("default", True)
        return lora.train()
    torch.manual_seed(seed)
    if model.kind == "gpt":
        return Gpt(model)
    return nn.Sequential(nn.Linear(FEATURES, model.width), nn.GELU(), nn.Linear(model.width, CLASSES))


@cache
def lora_of(pretrained: bool, rank: int, vocabulary: int) -> nn.Module:
    if pretrained:
        return Lora(facts.model_of(facts.Study(rank=rank, alpha=2 * rank)))
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)  # the same in every process
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base: Any = LlamaForCausalLM(LlamaConfig.from_dict({"vocab_size": vocabulary, **sizes}))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    inner: nn.Module = get_peft_model(base, config)
    return Lora(inner)
