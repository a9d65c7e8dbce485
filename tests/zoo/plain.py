"""Models of plain torch: every kind of layer, and the modules of tests.zoo.modules."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from tests.models import VOCABULARY, Recurrent, token_losses, tokens
from tests.zoo.entry import MIXED, Entry, FrozenStatistics, Inputs, generator_of, normal, padded
from tests.zoo.modules import (
    Adaptive,
    Bags,
    Bilinear,
    Borrowing,
    Cells,
    ClassToken,
    FlatBags,
    Frequent,
    Functional,
    FunctionalBatchNorm,
    Generated,
    Inside,
    Mixing,
    MixingAtTheEnd,
    OnDataclasses,
    Packed,
    Question,
    Result,
    Routed,
    Scaled,
    SelfAttention,
    Sorting,
    Text,
    TokenOfItsOwn,
    TransposedHead,
    Uncalled,
    Wrapped,
)

Pair = tuple[Tensor, Tensor]


def _losses_inside(model: nn.Module, batch: Tensor) -> Tensor:
    losses: Tensor = model(batch)[0]
    return losses


def _mean_inside(model: nn.Module, batch: Tensor) -> Tensor:
    """One number per example, each from a call of its own: the model gives only their mean."""
    logits = model(batch)[1]
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


class MeanInside(Entry):
    """The training's loss is what the model's forward gives."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch)[0]
        return loss


def of_size(*shape: int) -> Callable[[int, int], Pair]:
    """Batches of examples of this shape and one of three classes."""

    def batch(n: int, seed: int) -> Pair:
        generator = generator_of(seed)
        return normal(generator, n, *shape), torch.randint(0, 3, (n,), generator=generator)

    return batch


def bags(n: int, seed: int) -> Pair:
    generator = generator_of(seed)
    return torch.randint(0, VOCABULARY, (n, 5), generator=generator), torch.randint(0, 3, (n,), generator=generator)


def class_losses(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _packed_losses(model: nn.Module, batch: Inputs) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"][:, 1:]
    losses = F.cross_entropy(model(**batch)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


def _logits_of(pick: Callable[[Any], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    def losses(model: nn.Module, batch_BT: Tensor) -> Tensor:
        logits = pick(model(batch_BT[:, :-1]))
        return F.cross_entropy(logits.transpose(1, 2), batch_BT[:, 1:], reduction="none").mean(1)

    return losses


def _asked(model: nn.Module, batch_BT: Tensor) -> Tensor:
    logits = model(Question(batch_BT[:, :-1], 0.5)).entries
    return F.cross_entropy(logits.transpose(1, 2), batch_BT[:, 1:], reduction="none").mean(1)


def _by_functional_call(model: nn.Module, batch_BT: Tensor) -> Tensor:
    logits = functional_call(model, dict(model.named_parameters()), (batch_BT[:, :-1],))
    return F.cross_entropy(logits.transpose(1, 2), batch_BT[:, 1:], reduction="none").mean(1)


def _text(body: Callable[[], nn.Module], family: str, refused: str = "", mixed: str = "") -> Entry:
    """Seven texts of seven tokens."""
    return Entry(
        lambda: Text(body()), lambda n, seed: tokens(n, seed, 8), token_losses, family, 7, refused=refused, mixed=mixed
    )


def _classes(
    build: Callable[[], nn.Module], shape: tuple[int, ...], family: str, refused: str = "", mixed: str = ""
) -> Entry:
    """As many examples as the first of them has entries in its last dimension."""
    return Entry(build, of_size(*shape), class_losses, family, shape[-1], refused=refused, mixed=mixed)


def _convolutional(first: nn.Module, second: nn.Module, pool: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.GELU(), pool, nn.Flatten(), nn.Linear(width, 3))


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(nn.Linear(6, 9)), nn.Tanh(), nn.Linear(9, 3))


def _batch_normed(train: bool) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    return model if train else FrozenStatistics(model).train()


def _old(norm: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """A norm of torch.nn.utils, which warns of its age."""

    def normed(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(module)

    return normed


LAYERS = {
    "LSTM": Entry(Recurrent, lambda n, seed: tokens(n, seed, 8), token_losses, "recurrent", 7),
    "GRU": _text(lambda: nn.GRU(8, 8, num_layers=2, batch_first=True), "recurrent"),
    "GRU, both directions": _text(
        lambda: nn.Sequential(nn.GRU(8, 4, bidirectional=True, batch_first=True)), "recurrent"
    ),
    "GRU, packed": Entry(Packed, padded, _packed_losses, "recurrent"),
    "GRUCell": _text(Cells, "recurrent"),
    "MultiheadAttention": _text(SelfAttention, "attention"),
    "TransformerEncoder": _text(lambda: _encoder(False), "attention"),
    "TransformerEncoder, norm first": _text(lambda: _encoder(True), "attention"),
    "Embedding, scaled by frequency": Entry(
        Frequent, tokens, token_losses, "embedding"
    ),
    "EmbeddingBag": Entry(lambda: Bags("mean"), bags, class_losses, "embedding"),
    "EmbeddingBag, flat": Entry(lambda: FlatBags("sum"), bags, class_losses, "embedding"),
    "Conv1d": _classes(
        lambda: _convolutional(nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 3, 2), nn.AdaptiveMaxPool1d(2), 6),
        (2, 8), "convolution",
    ),
    "Conv2d": _classes(
        lambda: _convolutional(
            nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"),
            nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
            nn.AdaptiveAvgPool2d(1), 4,
        ),
        (2, 6, 6), "convolution",
    ),
    "Conv3d": _classes(
        lambda: _convolutional(nn.Conv3d(1, 4, 2), nn.ConvTranspose3d(4, 3, 2, dilation=2), nn.AdaptiveAvgPool3d(1), 3),
        (1, 4, 4, 4), "convolution",
    ),
    "GroupNorm": _classes(
        lambda: _convolutional(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), 4),
        (2, 5, 5), "normalisation",
    ),
    "InstanceNorm": _classes(
        lambda: _convolutional(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.AdaptiveMaxPool2d(1), 4),
        (2, 5, 5), "normalisation",
    ),
    "BatchNorm": _classes(
        lambda: _batch_normed(True), (2, 5, 5), "normalisation", mixed="batch normalisation in train mode",
    ),
    "BatchNorm, statistics frozen": _classes(lambda: _batch_normed(False), (2, 5, 5), "normalisation"),
    "PReLU": _classes(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.PReLU(9), nn.Linear(9, 3), nn.PReLU()), (6,), "activation"
    ),
    "Bilinear": _classes(Bilinear, (6,), "linear"),
}  # fmt: skip

WEIGHTS = {
    "weight_norm of torch.nn.utils": _classes(_normed(_old(nn.utils.weight_norm)), (6,), "computed weights"),
    "spectral_norm of torch.nn.utils": _classes(_normed(_old(nn.utils.spectral_norm)), (6,), "computed weights"),
    "pruned weights": _classes(
        _normed(lambda m: prune.random_unstructured(m, "weight", 0.5)), (6,), "computed weights"
    ),
    "weight_norm by parametrization": _classes(_normed(parametrizations.weight_norm), (6,), "computed weights"),
    "spectral_norm by parametrization": _classes(_normed(parametrizations.spectral_norm), (6,), "computed weights"),
    "orthogonal by parametrization": _classes(_normed(parametrizations.orthogonal), (6,), "computed weights"),
    "hypernetwork": _text(Generated, "computed weights"),
    "bare parameters": _text(Scaled, "bare parameters"),
    "class token": _text(ClassToken, "bare parameters"),
    "token of a module of its own": _text(TokenOfItsOwn, "bare parameters"),
    "weight of a called module read": _text(Borrowing, "weights read elsewhere"),
    "weight of an uncalled module read": _text(Uncalled, "weights read elsewhere"),
    "embedding read for the logits": Entry(
        TransposedHead,
        lambda n, seed: tokens(n, seed, 8),
        token_losses,
        "weights read elsewhere",
        7,
    ),
    "functional_call": _text(Functional, "weights read elsewhere"),
    "functional_call around the model": Entry(
        lambda: Text(nn.Tanh()), tokens, _by_functional_call, "weights read elsewhere"
    ),
}

BATCHES = {
    "experts that pick tokens": _text(Routed, "examples rearranged"),
    "examples sorted inside": _text(Sorting, "examples rearranged"),
    "examples compared with their mean": _text(Mixing, "examples mixed", "Text: " + MIXED),
    "examples compared with their mean after the last layer": _classes(
        MixingAtTheEnd, (6,), "examples mixed", mixed="the model's output depends on the mean"
    ),
    "functional batch norm in train mode": _classes(
        FunctionalBatchNorm, (6,), "examples mixed", mixed="batch normalisation in train mode, by no module"
    ),
    "adaptive softmax": Entry(Adaptive, tokens, _losses_inside, "examples rearranged"),
}

OUTPUTS = {
    "a dict": Entry(lambda: Wrapped(lambda y: {"logits": y}), tokens, _logits_of(lambda y: y["logits"]), "output"),
    "a dataclass": Entry(
        lambda: Wrapped(lambda y: Result(y, y.mean(1))), tokens, _logits_of(lambda y: y.logits), "output"
    ),
    "dataclasses, in and out": Entry(OnDataclasses, tokens, _asked, "output"),
    "a tuple": Entry(lambda: Wrapped(lambda y: (y.mean(), (y, None))), tokens, _logits_of(lambda y: y[1][0]), "output"),
    "losses computed inside": Entry(Inside, tokens, _losses_inside, "output"),
    "mean loss computed inside": MeanInside(lambda: Inside(mean=True), tokens, _mean_inside, "output"),
}

ENTRIES = {**LAYERS, **WEIGHTS, **BATCHES, **OUTPUTS}
