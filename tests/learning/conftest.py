from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from fedq.data import Client, Examples
from fedq.learning import FederatedAveraging, LocalTraining


class Tiny(nn.Module):
    """A dense layer above the threshold, and a small dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Linear(28 * 28, 16)
        self.small = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(torch.relu(self.big(x.flatten(1))))


class Normalised(nn.Module):
    """A model with float buffers and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.out = nn.Linear(28 * 28, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x).flatten(1))


def make_client(number: int, examples: int = 30) -> Client:
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(examples, 1, 28, 28, generator=generator)
    y = torch.randint(10, (examples,), generator=generator)
    return Client(number, lambda: Examples(x, y))


@pytest.fixture
def tiny() -> type[nn.Module]:
    return Tiny


@pytest.fixture
def normalised() -> type[nn.Module]:
    return Normalised


@pytest.fixture
def client() -> Callable[..., Client]:
    return make_client


@pytest.fixture
def process() -> Callable[..., FederatedAveraging]:
    def build(**changes: object) -> FederatedAveraging:
        parts: dict = {"model": Tiny, "client": LocalTraining(lr=0.1), "server": partial(torch.optim.SGD, lr=1.0)}
        return FederatedAveraging(**(parts | changes))

    return build
