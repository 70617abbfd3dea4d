"""Partitions split a dataset without clients over clients.

Each partition gives every example to one client, and at least one example to every client. All draws follow from a key.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from typing_extensions import override

from fedq.errors import check_range
from fedq.keys import Key

Columns = Mapping[str, np.ndarray]
"""Values of each example: "label" and "coarse_label" (int64, (N,)), "client" (any dtype, (N,))."""

Shares = Callable[[int, np.ndarray], np.ndarray]
"""Returns a client's unnormalised label shares, (C,). The other argument, bool (C,), marks labels with examples
left."""


LIMITS = (1e-100, 1e100)
"""The least and the largest concentration of a Dirichlet distribution. Beyond them, sums overflow or vanish."""


class Partition(Protocol):
    """Splits the examples of a dataset over clients."""

    def split(self, examples: int, columns: Columns, clients: int | None, key: Key) -> list[np.ndarray]:
        """Returns the numbers of each client's examples, int64.

        examples: number of examples.
        columns: values of each example.
        clients: number of clients; None for the clients that the dataset has.
        key: key of all draws.

        Raises ValueError if the dataset lacks a column or has too few examples.
        """
        ...


class Natural(Partition):
    """The clients that the dataset has, in the sorted order of their ids."""

    @override
    def split(self, examples: int, columns: Columns, clients: int | None, key: Key) -> list[np.ndarray]:
        try:
            _, client_of, counts = np.unique(column(columns, "client"), return_inverse=True, return_counts=True)
        except TypeError as error:
            raise ValueError(f"the ids of the dataset's clients cannot be sorted: {error}.") from error
        if clients is not None:
            raise ValueError(f"clients must be null, not {clients}: the dataset already has {len(counts)} clients.")
        return np.split(np.argsort(client_of, kind="stable"), counts.cumsum()[:-1])


class Iid(Partition):
    """Random examples for each client. Sizes differ by one at most."""

    @override
    def split(self, examples: int, columns: Columns, clients: int | None, key: Key) -> list[np.ndarray]:
        return _cut(examples, np.ones(number_of(clients, examples)), key)


class DirichletSizes(Partition):
    """Random examples for each client, and sizes from a symmetric Dirichlet distribution (Li 2022, NIID-Bench).

    alpha: concentration of each client, 1e-100 to 1e100. Small values give a few large clients.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        check_range("alpha", alpha, *LIMITS)
        self.alpha = alpha

    @override
    def split(self, examples: int, columns: Columns, clients: int | None, key: Key) -> list[np.ndarray]:
        concentrations = np.full(number_of(clients, examples), self.alpha)
        return _cut(examples, key.fold("sizes").generator().dirichlet(concentrations), key)


class PowerLaw(Partition):
    """Random examples for each client, and sizes by a power law: the k-th largest client has a share of k^−exponent.

    exponent: 0 or more; 0 gives equal sizes.
    """

    def __init__(self, exponent: float = 1.0) -> None:
        check_range("exponent", exponent, low=0)
        self.exponent = exponent

    @override
    def split(self, examples: int, columns: Columns, clients: int | None, key: Key) -> list[np.ndarray]:
        ranks = 1.0 + key.fold("sizes").permutation(number_of(clients, examples))
        return _cut(examples, ranks**-self.exponent, key)


class Shards(Partition):
    """Examples are sorted by label and cut into equal shards. Each client gets random shards (McMahan 2016, §3).

    shards: shards of a client, 1 or more. A client has about as many labels.
    """

    def __init__(self, shards: int = 2) -> None:
        check_range("shards", shards, low=1, integer=True)
        self.shards = shards

    @override
    def split(self, examples: int, columns: Columns, clients: int | None, key: Key) -> list[np.ndarray]:
        count = number_of(clients, examples // self.shards, f"the dataset gives {self.shards} shards each")
        order = key.fold("order").permutation(examples)
        by_label = order[np.argsort(column(columns, "label")[order], kind="stable")]
        shards = np.array_split(by_label, count * self.shards)
        dealt = key.fold("deal").permutation(len(shards)).reshape(count, self.shards)
        return [np.concatenate([shards[i] for i in row]) for row in dealt]


class Dirichlet(Partition):
    """Labels by a Dirichlet distribution (Hsu, Qi and Brown 2019). Clients' sizes differ by one at most.

    Each client draws its label shares from Dir(α p), where p are the label shares of the dataset. From these shares,
    the client draws the label of each of its examples. Labels without examples left are skipped. In the paper, each
    client draws all its examples before the next client. Here clients take turns, one example each; otherwise the last
    clients would get only the remaining labels.

    alpha: mean concentration of a label, 1e-100 to 1e100: the paper's α divided by the number of labels.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        check_range("alpha", alpha, *LIMITS)
        self.alpha = alpha

    @override
    def split(self, examples: int, columns: Columns, clients: int | None, key: Key) -> list[np.ndarray]:
        labels = column(columns, "label")
        counts = np.unique(labels, return_counts=True)[1]
        generator = key.fold("deal").generator()
        concentrations = self.alpha * len(counts) * counts / examples
        drawn = generator.dirichlet(concentrations, number_of(clients, examples))
        return _dealt(labels, len(drawn), lambda client, left: drawn[client] * left, generator, key)


class Pachinko(Partition):
    """Labels by Pachinko allocation (Reddi 2021, §F): superclass first, then label. Sizes differ by one at most.

    Each client draws shares of superclasses, and shares of the labels in each superclass. Both are from symmetric
    Dirichlet distributions. If a label has no examples left, the other labels of the superclass take its share. Clients
    take turns, as in Dirichlet.

    alpha: concentration of each superclass, 1e-100 to 1e100.
    beta: concentration of each label in its superclass, 1e-100 to 1e100.
    """

    def __init__(self, alpha: float = 0.1, beta: float = 10.0) -> None:
        check_range("alpha", alpha, *LIMITS)
        check_range("beta", beta, *LIMITS)
        self.alpha, self.beta = alpha, beta

    @override
    def split(self, examples: int, columns: Columns, clients: int | None, key: Key) -> list[np.ndarray]:
        labels, count = column(columns, "label"), number_of(clients, examples)
        pairs = np.unique(np.stack([labels, column(columns, "coarse_label")]), axis=1)
        if len(np.unique(pairs[0])) < pairs.shape[1]:
            raise ValueError("a label is in two superclasses; Pachinko needs one superclass for each label.")
        coarse, parent = np.unique(pairs[1], return_inverse=True)
        generator = key.fold("deal").generator()
        of_coarse = generator.dirichlet(np.full(len(coarse), self.alpha), count)[:, parent]
        inside = np.empty(of_coarse.shape)
        for c in range(len(coarse)):
            children = np.flatnonzero(parent == c)
            inside[:, children] = generator.dirichlet(np.full(len(children), self.beta), count)

        def shares_of(client: int, left: np.ndarray) -> np.ndarray:
            remaining = inside[client] * left
            total = np.bincount(parent, remaining)[parent]
            result: np.ndarray = np.divide(
                of_coarse[client] * remaining, total, out=np.zeros(len(total)), where=total > 0
            )
            return result

        return _dealt(labels, count, shares_of, generator, key)


def column(columns: Columns, name: str) -> np.ndarray:
    """Returns a column. Raises ValueError if the dataset lacks the column."""
    if name not in columns:
        raise ValueError(f"the dataset has no {name} of each example, which this partition needs: choose another.")
    return columns[name]


def number_of(clients: int | None, most: int, reason: str = "each needs an example") -> int:
    """Returns `clients`. Raises ValueError, with the reason, unless `clients` is from 1 to `most`."""
    if clients is None:
        raise ValueError("clients must be a number for this partition: the dataset has no clients.")
    check_range("clients", clients, low=1, integer=True)
    if clients > most:
        raise ValueError(f"clients must be at most {most}, not {clients}: {reason}.")
    return clients


def deal(
    counts: np.ndarray, clients: int, shares: Shares, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the label of each example and its rank among the examples of the label, int64, (N,) each.

    Clients take turns: example k goes to client k mod `clients`. If the labels in a client's shares have no examples
    left, the client draws from the other labels.

    counts: number of examples of each label, (C,).
    clients: number of clients.
    shares: label shares of a client.
    generator: draws the labels.
    """
    used = np.zeros(len(counts), dtype=np.int64)
    labels, ranks = np.empty((2, counts.sum()), dtype=np.int64)
    for k, uniform in enumerate(generator.random(len(labels))):
        edges = shares(k % clients, used < counts).cumsum()
        if edges[-1] < 1e-12:
            edges = (counts - used).cumsum()
        c = edges.searchsorted(uniform * edges[-1], side="right")
        labels[k], ranks[k] = c, used[c]
        used[c] += 1
    return labels, ranks


def _dealt(
    labels: np.ndarray, clients: int, shares: Shares, generator: np.random.Generator, key: Key
) -> list[np.ndarray]:
    """Returns each client's examples, with labels by `deal`. The examples of a label are in random order."""
    counts = np.unique(labels, return_counts=True)[1]
    order = key.fold("order").permutation(len(labels))
    by_label = order[np.argsort(labels[order], kind="stable")]
    drawn, ranks = deal(counts, clients, shares, generator)
    picked = by_label[(counts.cumsum() - counts)[drawn] + ranks]
    return [picked[client::clients] for client in range(clients)]


def _cut(examples: int, shares: np.ndarray, key: Key) -> list[np.ndarray]:
    """Returns random examples. Each client gets one, and a share of the others, rounded by largest remainders."""
    ideal = (examples - len(shares)) * (shares / shares.sum())
    sizes = ideal.astype(np.int64)
    largest = np.argsort(sizes - ideal, kind="stable")[: examples - len(shares) - sizes.sum()]
    sizes[largest] += 1
    return np.split(key.fold("order").permutation(examples), (1 + sizes).cumsum()[:-1])
