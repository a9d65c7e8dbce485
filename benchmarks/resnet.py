"""ResNet-18 (He et al., 2015) for small images: a first convolution of 3 x 3 and no pooling before the stages.

Batch normalisation in training mode makes examples depend on one another, so that no example has a gradient of its own.
What stands in its place: batch normalisation with fixed statistics ("frozen-batch", as in fine-tuning), or group
normalisation over four channels each ("group").
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["frozen-batch", "group"]


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that stays in eval mode: scale and shift are trained, the statistics are not."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


def norm_of(norm: Norm, channels: int) -> nn.Module:
    return FrozenBatchNorm(channels) if norm == "frozen-batch" else nn.GroupNorm(channels // 4, channels)


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.norm1 = norm_of(norm, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = norm_of(norm, outer)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.around = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), norm_of(norm, outer))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_BCHW)))))
        out: Tensor = F.relu(y_BCHW + self.around(x_BCHW))
        return out


class ResNet18(nn.Module):
    """Four stages of two blocks; `width` channels in the first, twice as many in every next one.

    `colours` are the images' channels, `stride` is that of the first convolution.
    """

    def __init__(
        self, norm: Norm = "frozen-batch", classes: int = 10, width: int = 64, colours: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(colours, width, 3, stride, padding=1, bias=False)
        self.norm = norm_of(norm, width)
        blocks, inner = [], width
        for stage in range(4):
            outer = width * 2**stage
            blocks += [Block(inner, outer, 1 if stage == 0 else 2, norm), Block(outer, outer, 1, norm)]
            inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inner, classes)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """What the head sees: [B, 8 * width]."""
        y_BCHW: Tensor = self.blocks(F.relu(self.norm(self.conv(x_BCHW))))
        return y_BCHW.mean(dim=(2, 3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x_BCHW))
        return logits


def settle(model: nn.Module, x_BCHW: Tensor) -> None:
    """Give frozen batch normalisation the statistics of a batch."""
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm)]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with torch.no_grad():
        model(x_BCHW)
    for norm in norms:
        norm.training, norm.momentum = False, 0.1
