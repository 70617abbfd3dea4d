"""Holds out examples of any federated dataset for validation, client by client."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from fedq.data.dataset import Client, Examples, FederatedDataset, pooled
from fedq.errors import FedqError
from fedq.keys import Key

MOST_CLIENTS = 1000
"""Largest number of clients in a validation set, because a run keeps the set in memory."""

_TOO_SMALL = "run.validation: clients are too small for this share: hold out more, such as run.validation=0.2"
_NONE_OWN = "run.validation: the dataset has no validation examples: hold some out, such as run.validation=0.1"


class HeldOut:
    """Holds out a share of a dataset for validation. A client is read only when its examples are needed.

    num_classes: As in the dataset.
    num_clients: The number of clients that train.
    """

    def __init__(
        self, dataset: FederatedDataset, share: float, by: Literal["examples", "clients"] = "examples", seed: int = 0
    ) -> None:
        """Draws the held-out examples or clients from keys.

        dataset: Any federated dataset.
        share: The share that is held out, above 0 and below 1, rounded to a number of examples or clients.
        by: With "examples", each client keeps at least one example for training. With "clients", one client in each
            block of neighbouring clients is held out. The other clients get new numbers.
        seed: The run's seed.

        Raises FedqError if no client would be left to train.
        """
        self._dataset, self._share, self._by, self._seed = dataset, share, by, seed
        self._all, self.num_classes = dataset.num_clients, dataset.num_classes
        self._held = max(1, round(share * self._all)) if by == "clients" else 0
        self.num_clients = self._all - self._held
        if not self.num_clients:
            raise FedqError(f"run.validation: {share} of {self._all} clients leaves no client to train")

    def client(self, number: int) -> Client:
        """Returns the training client `number`, without reading its examples."""
        if self._by == "clients":
            block = bisect_right(range(self._held), number, key=lambda i: self._first(i) - i) - 1
            place = number + block  # the client's number if every held-out client were the last of its block
            return replace(self._dataset.client(place + (place >= self._held_out(block))), number=number)
        client = self._dataset.client(number)
        held = self._number_held(client.examples)
        return replace(
            client,
            load=lambda: self._part(client, held_out=False),
            examples=client.examples - held,
            validation=lambda: self._part(client, held_out=True),
        )

    def test(self) -> Examples:
        """Returns the dataset's test set."""
        return self._dataset.test()

    def validation(self) -> Examples:
        """Returns the held-out examples of at most MOST_CLIENTS clients."""
        if self._by == "examples":
            return _pooled(self.client, self.num_clients, self._seed, lambda client: client.validation, _TOO_SMALL)
        return _pooled(
            lambda i: self._dataset.client(self._held_out(i)),
            self._held,
            self._seed,
            lambda client: client.load,
            _TOO_SMALL,
        )

    def _first(self, block: int) -> int:
        """Returns the number, in the dataset, of the first client of a block."""
        return block * self._all // self._held

    def _held_out(self, block: int) -> int:
        """Returns the number, in the dataset, of the held-out client of a block."""
        first = self._first(block)
        return first + Key(self._seed, 0, block).fold("validation").integer() % (self._first(block + 1) - first)

    def _number_held(self, examples: int) -> int:
        return max(0, min(round(self._share * examples), examples - 1))

    def _part(self, client: Client, held_out: bool) -> Examples:
        """Returns the client's held-out examples, or its training examples, in the client's order."""
        x, y = client.load()
        order = Key(self._seed, 0, client.number).fold("validation").permutation(len(y))
        held = self._number_held(len(y))
        chosen = torch.from_numpy(np.sort(order[:held] if held_out else order[held:]))
        return Examples(x[chosen], y[chosen])


def validation_set(dataset: FederatedDataset, seed: int) -> Examples:
    """Returns a dataset's `validation()`. Without one, returns the validation examples of at most MOST_CLIENTS clients.

    seed: The run's seed, from which the clients are drawn.

    Raises FedqError if the set would be empty.
    """
    if hasattr(dataset, "validation"):
        examples: Examples = dataset.validation()
        return examples
    return _pooled(dataset.client, dataset.num_clients, seed, lambda client: client.validation, _NONE_OWN)


def drawn(seed: int, name: str, population: int, size: int) -> Iterable[int]:
    """Returns `size` random client numbers, in ascending order; all below `population` if `population` is smaller."""
    if size >= population:
        return range(population)
    choice = Key(seed).fold(name).generator().choice(population, size, replace=False)
    return map(int, np.sort(choice))


def _pooled(
    client: Callable[[int], Client],
    population: int,
    seed: int,
    reader: Callable[[Client], Callable[[], Examples] | None],
    lacking: str,
) -> Examples:
    """Returns the examples of at most MOST_CLIENTS clients as one set.

    client: Returns a client by number, from 0 to `population` − 1.
    reader: Returns the function that reads a client's examples; None if the client has no examples.
    lacking: The error's text if no client has examples.
    """
    readers = map(reader, map(client, drawn(seed, "validation", population, MOST_CLIENTS)))
    parts = [part for part in (Examples(*read()) for read in readers if read) if len(part.y)]
    if not parts:
        raise FedqError(lacking)
    return pooled(parts)
