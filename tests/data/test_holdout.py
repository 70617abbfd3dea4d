"""Held-out validation examples: no example is lost or used twice, and clients are read only when needed."""

from dataclasses import replace

import pytest
import torch

from fedq.data import Client, Examples
from fedq.data.holdout import MOST_CLIENTS, HeldOut, drawn, validation_set
from fedq.errors import FedqError

SIZES = [10, 1, 0, 37, 4, 100, 5]


class Numbered:
    """All examples differ; records the clients that are read."""

    num_classes = 10

    def __init__(self, sizes=SIZES, known=True):
        self.sizes, self.num_clients, self.known, self.read = sizes, len(sizes), known, []

    def client(self, number):
        def load():
            self.read.append(number)
            x = 1000 * number + torch.arange(self.sizes[number])
            return Examples(x.reshape(-1, 1).float(), x % 10)

        return Client(number, load, self.sizes[number] if self.known else 0)

    def test(self):
        return Examples(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


def ids(examples: Examples) -> list[int]:
    assert examples.y.tolist() == (examples.x[:, 0] % 10).tolist()  # inputs keep their labels
    return [int(number) for number in examples.x[:, 0]]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_each_example_trains_or_validates(share, known):
    dataset = Numbered(known=known)
    held = HeldOut(dataset, share, seed=3)
    assert (held.num_clients, held.num_classes) == (len(SIZES), 10)
    for number, size in enumerate(SIZES):
        client = held.client(number)
        trains, validates = ids(client.load()), ids(client.validation())
        assert client.number == number
        assert client.examples == (len(trains) if known else 0)
        assert sorted(trains + validates) == [1000 * number + i for i in range(size)]
        assert (trains, validates) == (sorted(trains), sorted(validates))
        assert len(validates) == max(0, min(round(share * size), size - 1))
    if share > 0.01:
        assert ids(held.validation()) == [i for n in range(len(SIZES)) for i in ids(held.client(n).validation())]
    assert torch.equal(held.test().x, dataset.test().x)


def test_the_draw_follows_the_key():
    first, again, other = (HeldOut(Numbered(), 0.5, seed=seed) for seed in (1, 1, 2))
    assert ids(first.client(5).validation()) == ids(again.client(5).validation())
    assert ids(first.client(5).validation()) != ids(other.client(5).validation())
    offsets = [[i % 1000 for i in ids(HeldOut(Numbered([50] * 2), 0.5).client(n).validation())] for n in (0, 1)]
    assert offsets[0] != offsets[1]


@pytest.mark.parametrize("population", [2, 3, 7, 10, 101])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.49])
def test_each_client_trains_or_validates(population, share):
    dataset = Numbered([1 + n % 3 for n in range(population)])
    held = HeldOut(dataset, share, "clients", seed=1)
    assert held.num_clients == population - max(1, round(share * population))
    trains = [held.client(number) for number in range(held.num_clients)]
    assert [client.number for client in trains] == list(range(held.num_clients))
    assert dataset.read == []
    known = [ids(client.load()) for client in trains]
    assert known == sorted(known)  # in the dataset's order
    validates = ids(held.validation())
    everyone = [i for n in range(population) for i in ids(dataset.client(n).load())]
    assert sorted(validates + [i for part in known for i in part]) == everyone


def test_clients_are_held_out_equally_often():
    counts = dict.fromkeys(range(10), 0)
    for seed in range(500):
        for i in ids(HeldOut(Numbered([1] * 10), 0.2, "clients", seed).validation()):
            counts[i // 1000] += 1
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 27.9  # chi-square, 9 degrees, 1 in 1,000


class Endless(Numbered):
    """A population for which no list of clients fits into memory."""

    def __init__(self):
        super().__init__()
        self.num_clients = 10**12

    def client(self, number):
        assert 0 <= number < self.num_clients
        return replace(super().client(0), number=number, load=lambda: self._one(number))

    def _one(self, number):
        self.read.append(number)
        return Examples(torch.full((4, 1), float(number)), torch.arange(4))


@pytest.mark.parametrize("by", ["examples", "clients"])
def test_a_large_population_costs_no_memory(by):
    dataset = Endless()
    held = HeldOut(dataset, 0.25, by, seed=5)
    assert held.num_clients == (10**12 if by == "examples" else 750_000_000_000)
    for number in (0, 12_345_678_901, held.num_clients - 1):
        held.client(number)
    assert dataset.read == []
    examples = held.validation()
    assert len(set(dataset.read)) == len(dataset.read) == MOST_CLIENTS
    assert len(examples.y) == MOST_CLIENTS * (1 if by == "examples" else 4)


def test_a_datasets_own_validation_examples():
    class Own(Numbered):
        def client(self, number):
            return replace(super().client(number), validation=super().client(number).load if number in (3, 4) else None)

    assert ids(validation_set(Own(), 0)) == [*range(3000, 3037), *range(4000, 4004)]
    whole = Own()
    whole.validation = lambda: Examples(torch.ones(2, 1), torch.ones(2))
    assert len(validation_set(whole, 0).y) == 2
    assert whole.read == []


def test_a_set_without_examples_is_told():
    with pytest.raises(FedqError, match=r"the dataset has no validation examples: hold some out, such as .*=0\.1$"):
        validation_set(Numbered(), 0)
    with pytest.raises(FedqError, match=r"clients are too small for this share: hold out more, such as .*=0\.2$"):
        HeldOut(Numbered([2, 3]), 0.1).validation()
    with pytest.raises(FedqError, match=r"run.validation: 0.9 of 2 clients leaves no client to train"):
        HeldOut(Numbered([2, 3]), 0.9, "clients")


def test_a_draw_has_distinct_clients_in_order():
    assert list(drawn(0, "x", 5, 9)) == [0, 1, 2, 3, 4]
    found = list(drawn(0, "x", 1000, 30))
    assert found == sorted(set(found))
    assert len(found) == 30
    assert found != list(drawn(0, "y", 1000, 30))
    assert found != list(drawn(1, "x", 1000, 30))


def test_clients_of_other_shapes_are_one_sentence():
    class Ragged(Numbered):
        def client(self, number):
            return Client(number, lambda: Examples(torch.zeros(4, 1 + number), torch.zeros(4, dtype=torch.int64)), 4)

    with pytest.raises(FedqError, match="the inputs of clients are .* all clients need one shape and one dtype"):
        HeldOut(Ragged(), 0.5).validation()
