"""A tiny run on a dataset of noise."""

from functools import partial

import torch

from fedq.config_nodes import RunConfig
from fedq.data import Client, Examples
from fedq.learning import FederatedAveraging, LocalTraining
from fedq.models import MLP

RUN = RunConfig(
    rounds=5,
    clients_per_round=2,
    seed=3,
    evaluate_every=2,
    test_batch_size=500,
    checkpoint_every=1,
    keep=2,
    resume="auto",
    min_clients=1,
    repeats=0,
    workers=1,
    device="cpu",
    precision="float32",
    faults=None,
    guard=None,
    submodel=None,
)


class Noise:
    """A dataset of noise that records the clients that were read."""

    num_classes = 10
    num_clients = 6

    def __init__(self) -> None:
        self.read: list[int] = []

    def client(self, number: int) -> Client:
        def load() -> Examples:
            self.read.append(number)
            generator = torch.Generator().manual_seed(number)
            return Examples(torch.rand(20, 1, 28, 28, generator=generator), torch.arange(20) % 10)

        return Client(number, load)

    def test(self) -> Examples:
        return Examples(torch.zeros(10, 1, 28, 28), torch.arange(10))


def make_process() -> FederatedAveraging:
    return FederatedAveraging(
        partial(MLP, 10), LocalTraining(lr=0.1), partial(torch.optim.SGD, lr=1.0, momentum=0.5), seed=RUN.seed
    )
