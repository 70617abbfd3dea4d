"""Augmentation: random changes of a client's inputs in training, drawn by key."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedq.errors import check_range


class Augment(Protocol):
    """Changes a client's inputs for one epoch."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns changed inputs; `x` does not change.

        x: inputs, (N, …), on any device.
        generator: source of all draws, on the CPU, so that all devices draw the same.
        """
        ...


class CropAndFlip(Augment):
    """Pads each image with zeros, crops it at random, and mirrors it at random (He 2016, §4.2).

    padding: pixels of zeros at each edge, 0 or more.
    flip: probability that left and right are exchanged, 0 to 1.
    size: height and width of the crop, 1 or more; None for the size of the image.
    """

    def __init__(self, padding: int = 4, flip: float = 0.5, size: int | None = None) -> None:
        check_range("padding", padding, low=0, integer=True)
        check_range("flip", flip, low=0, high=1)
        check_range("size", size, low=1, integer=True, optional=True)
        self.padding, self.flip, self.size = padding, flip, size

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns images (N, C, `size`, `size`) of `x`, (N, C, H, W). Raises ValueError for other shapes."""
        if x.dim() != 4:
            raise ValueError(f"CropAndFlip takes images (N, C, H, W), not {tuple(x.shape)}: set client/augment=none")
        n, _, *sides = x.shape
        height, width = (self.size or side for side in sides)
        free = [side + 2 * self.padding - crop for side, crop in zip(sides, (height, width), strict=True)]
        if min(free) < 0:
            raise ValueError(
                f"images {tuple(x.shape)} have no crop of {height} × {width}: set client.augment.size lower"
            )
        down, right = (torch.randint(places + 1, (n, 1), generator=generator) for places in free)
        mirrored = torch.rand((n, 1), generator=generator) < self.flip
        across = torch.arange(width)
        rows = (down + torch.arange(height)).to(x.device)  # (N, height)
        columns = (right + torch.where(mirrored, across.flip(0), across)).to(x.device)  # (N, width)
        padded = F.pad(x, [self.padding] * 4).permute(0, 2, 3, 1)
        images = torch.arange(n, device=x.device)
        return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
