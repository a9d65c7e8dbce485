"""Small models of every kind that people train, each with its batches and a loss for every example."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 31


@dataclass(frozen=True)
class Case:
    """A model and its task: `batch(n, seed)` gives n examples, `losses(model, batch)` one loss per example."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    losses: Callable[[nn.Module, Any], Tensor]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.losses(model, batch).mean()

    def at(self, batch: Any) -> Callable[[nn.Module], Tensor]:
        """The loss of this batch as a function of the model."""
        return lambda model: self.loss(model, batch)

    def parts(self, batch: Any, n: int) -> Callable[[nn.Module], Tensor]:
        """For the oracle: each example's part of `loss`, the mean over n."""
        return lambda model: self.losses(model, batch) / n


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in self.c_attn(x_BTD).split(D, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return torch.as_tensor(self.c_proj(y.transpose(1, 2).reshape(B, T, D)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + torch.as_tensor(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A GPT in nanoGPT's manner: position embeddings of shape [T, d], and a head that shares the embedding's weight."""

    def __init__(
        self,
        vocabulary: int = VOCABULARY,
        width: int = 16,
        layers: int = 2,
        heads: int = 2,
        positions: int = 12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x = self.drop(self.wte(tokens_BT) + self.wpe(positions_T))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


class PackedGPT(nn.Module):
    """A GPT for packed documents: tokens with their positions in their documents, and a mask of who may see whom."""

    def __init__(self, width: int = 16, layers: int = 2, heads: int = 2, positions: int = 12) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(positions, width)
        self.h = nn.ModuleList(Block(width, heads, 0.0) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, seen_B1TT: Tensor) -> Tensor:
        x = self.wte(tokens_BT) + self.wpe(positions_BT)
        for block in self.h:
            assert isinstance(block, Block)
            y, attention = block.ln_1(x), block.attn
            B, T, D = y.shape
            q, k, v = (
                part.view(B, T, attention.heads, -1).transpose(1, 2) for part in attention.c_attn(y).split(D, dim=2)
            )
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B1TT)
            x = x + attention.c_proj(z.transpose(1, 2).reshape(B, T, D))
            x = x + torch.as_tensor(block.mlp(block.ln_2(x)))
        return torch.as_tensor(self.lm_head(self.ln_f(x)))


class Recurrent(nn.Module):
    """An LSTM of two layers that takes the batch in its second dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2)
        self.head = nn.Linear(5, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        y_TBD, _ = self.lstm(self.embedding(tokens_BT.T))
        logits: Tensor = self.head(y_TBD).transpose(0, 1)
        return logits


class Repeated(nn.Module):
    """One module called three times in a forward, and one whose output merges batch and time (as OPT's does)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.norm = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.RMSNorm(8)
        self.merged, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(VOCABULARY))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for _ in range(3):
            x = x + torch.tanh(self.block(self.norm(x)))
        x = x + self.merged(x.reshape(-1, 8)).reshape(x.shape)
        logits: Tensor = self.head(x) * self.scale
        return logits


def tokens(n: int, seed: int, length: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def token_losses(model: nn.Module, batch_BT: Tensor) -> Tensor:
    output = model(batch_BT[:, :-1])
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.transpose(1, 2), batch_BT[:, 1:], reduction="none").mean(dim=1)


def vectors(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator, dtype=torch.get_default_dtype()), torch.randint(
        0, 3, (n,), generator=generator
    )


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 8, 8, generator=generator, dtype=torch.get_default_dtype()), torch.randint(
        0, 3, (n,), generator=generator
    )


def class_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.GELU(), nn.ConvTranspose2d(6, 3, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3),
    )  # fmt: skip


def hugging_face_gpt2(dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=12, n_embd=16, n_layer=2, n_head=2,
                   resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
                   bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


def hugging_face_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=12, bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


CASES = {
    "mlp": Case(mlp, vectors, class_losses),
    "convolutional": Case(convolutional, images, class_losses),
    "gpt": Case(GPT, tokens, token_losses),
    "hugging-face-gpt2": Case(hugging_face_gpt2, tokens, token_losses),
    "hugging-face-llama": Case(hugging_face_llama, tokens, token_losses),
    "lstm": Case(Recurrent, tokens, token_losses),
    "repeated": Case(Repeated, tokens, token_losses),
}
