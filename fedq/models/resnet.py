"""Residual networks for small images."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResNet(nn.Module):
    """The residual network of He et al. (2016) for small images: a 3 × 3 convolution without pooling comes first.

    ResNet(10) is their ResNet-20 (§4.2). With batch norm, ResNet(10) has 272,474 parameters.
    ResNet(10, 2, (64, 128, 256, 512), projection=True) is their ResNet-18 with that first layer: 11,173,962 parameters.
    The input is float32 (N, channels, H, W), the output logits (N, num_classes).

    num_classes: Number of classes.
    blocks: Number of blocks of each stage; a block has two 3 × 3 convolutions.
    widths: Number of channels of each stage. All stages except the first halve height and width.
    projection: How shortcuts change the shape: true for a 1 × 1 convolution (option B), false for zeros (option A).
    channels: Number of channels of an image.
    norm: "batch" or "group": group norm with two groups (Hsieh 2020, Reddi 2021) treats each example separately.
    crop: Height and width of the middle of an image that the network sees; None for all of the image.
    standardise: Whether each image is scaled to a mean of 0 and a variance of 1, after the crop.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        projection: bool = False,
        channels: int = 3,
        norm: Literal["group", "batch"] = "batch",
        crop: int | None = None,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.crop, self.standardise = crop, standardise
        self.conv = _conv(channels, widths[0])
        self.norm = _norm(norm, widths[0])
        self.stages = nn.Sequential()
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                self.stages.append(Block(before, width, stride, projection, norm))
                before = width
        self.dense = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of images `x`."""
        if self.crop is not None:
            if min(x.shape[2:]) < self.crop:
                raise ValueError(
                    f"images {tuple(x.shape)} have no {self.crop} × {self.crop} pixels: set model.crop lower"
                )
            top, left = ((side - self.crop) // 2 for side in x.shape[2:])
            x = x[:, :, top : top + self.crop, left : left + self.crop]
        x = standardised(x) if self.standardise else x
        x = self.stages(F.relu(self.norm(self.conv(x))))
        logits: Tensor = self.dense(x.mean((2, 3)))
        return logits


def standardised(x: Tensor) -> Tensor:
    """Returns each image of `x` (N, C, H, W), in [0, 1], with a mean of 0 and a variance of 1.

    The divisor is at least 1 / (255 √(C·H·W)), as in tf.image.per_image_standardization: an image of one colour becomes
    0.
    """
    deviation, mean = torch.std_mean(x, (1, 2, 3), correction=0, keepdim=True)
    return (x - mean) / deviation.clamp_min(1 / (255 * math.sqrt(x[0].numel())))


class Block(nn.Module):
    """Two convolutions and a shortcut around them. A stride of 2 halves height and width."""

    def __init__(self, before: int, width: int, stride: int, projection: bool, norm: Literal["group", "batch"]) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, width, stride), _norm(norm, width)
        self.conv2, self.norm2 = _conv(width, width), _norm(norm, width)
        self.shortcut: nn.Module
        if stride == 1 and before == width:
            self.shortcut = nn.Identity()
        elif projection:
            self.shortcut = nn.Sequential(_conv(before, width, stride, size=1), _norm(norm, width))
        else:
            self.shortcut = PaddedShortcut(stride, width - before)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, width, H / stride, W / stride) for `x` of (N, before, H, W)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class PaddedShortcut(nn.Module):
    """Takes every `stride`-th row and column; adds channels of zeros, half before and half after the others."""

    def __init__(self, stride: int, added: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, added // 2, added - added // 2

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C + added, H / stride, W / stride) for `x` of (N, C, H, W)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _conv(before: int, width: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(before, width, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _norm(norm: Literal["group", "batch"], width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)
