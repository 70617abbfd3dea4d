"""Augmentation: random changes of a client's inputs in training, drawn by key."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedq.errors import check_range


class Augment(Protocol):
    """Changes the inputs of an epoch of a client."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns changed inputs; `x` stays as it is.

        x: inputs, (N, …), on any device.
        generator: makes all draws; on the CPU, so that devices draw alike.
        """
        ...


class CropAndFlip(Augment):
    """Crops each image at random after zeros are added at its edges, and mirrors it at random (He 2016, §4.2).

    padding: pixels of zeros at each edge, 0 or more.
    flip: probability that left and right are exchanged, 0 to 1.
    """

    def __init__(self, padding: int = 4, flip: float = 0.5) -> None:
        check_range("padding", padding, low=0, integer=True)
        check_range("flip", flip, low=0, high=1)
        self.padding, self.flip = padding, flip

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns images of the shape of `x`, (N, C, H, W). Raises ValueError for other shapes."""
        if x.dim() != 4:
            raise ValueError(f"CropAndFlip takes images (N, C, H, W), not {tuple(x.shape)}: set client/augment=none")
        n, _, height, width = x.shape
        shifts = torch.randint(2 * self.padding + 1, (2, n, 1), generator=generator)
        mirrored = torch.rand((n, 1), generator=generator) < self.flip
        across = torch.arange(width)
        rows = (shifts[0] + torch.arange(height)).to(x.device)  # (N, H)
        columns = (shifts[1] + torch.where(mirrored, across.flip(0), across)).to(x.device)  # (N, W)
        padded = F.pad(x, [self.padding] * 4).permute(0, 2, 3, 1)
        images = torch.arange(n, device=x.device)
        return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
