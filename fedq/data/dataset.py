"""What a federated dataset is: a population of clients, each with its own examples, and a test set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Examples(NamedTuple):
    """What a model takes, and the classes that it is to tell.

    x: shape (N, …), of any dtype that the model takes; images are float32, (N, 1, 28, 28), values in [0, 1]. y: int64,
    shape (N,), the class of each.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Client:
    """One client: its number in the population, and how to read its examples when it is sampled.

    The number names the client's random draws. `load` may be called from any worker thread; it
    gives the same each time, and what OSError and FedqError it raises ends the run. `examples`, the number of
    its examples, is for sharing out the work; 0 where that is not known without reading.
    """

    number: int
    load: Callable[[], Examples]
    examples: int = 0


class FederatedDataset(Protocol):
    """What the simulation asks of a dataset. Clients are numbered from 0 and read only when asked for."""

    num_classes: int
    num_clients: int

    def client(self, number: int) -> Client:
        """Returns client `number`; reads nothing yet."""
        ...

    def test(self) -> Examples:
        """Returns the test set of the whole population."""
        ...
