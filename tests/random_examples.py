"""A small dataset for models of any kind."""

import torch

from fedq.data import Client, Examples


class RandomExamples:
    """Four clients with four random examples each: float32 images of a shape, or sequences of tokens."""

    num_classes, num_clients = 10, 4

    def __init__(self, shape: list[int] | None = None) -> None:
        self.shape = shape

    def client(self, number: int) -> Client:
        return Client(number, lambda: self._draw(number), 4)

    def test(self) -> Examples:
        return self._draw(self.num_clients)

    def _draw(self, seed: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        if self.shape is None:
            tokens = torch.randint(1, 10, (4, 9), generator=generator)
            return Examples(tokens[:, :-1], tokens[:, 1:])
        return Examples(torch.rand(4, *self.shape, generator=generator), torch.arange(4))
