"""The procedural writers: the effect of the seed, the format of images, and the likeness to real digits.

The real digits are of 120 writers of MNIST, known from QMNIST, with about 100 images each.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fedq.data.dataset import Examples, FederatedDataset
from fedq.data.writers import Writers
from fedq.keys import Key

WRITERS = 100


@pytest.fixture(scope="module")
def population() -> list[Examples]:
    """Returns the examples of 100 writers, ink 1.0 on 0.0."""
    dataset = Writers(clients=WRITERS, background=0.0)
    return [dataset.client(number).load() for number in range(WRITERS)]


@pytest.fixture(scope="module")
def everything(population: list[Examples]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the images (N, 784), labels (N,) and writers (N,) of the population."""
    writer = torch.cat([torch.full_like(examples.y, number) for number, examples in enumerate(population)])
    return torch.cat([x.flatten(1) for x, _ in population]), torch.cat([y for _, y in population]), writer


def same(a: Examples, b: Examples) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_fulfils_the_protocol() -> None:
    dataset: FederatedDataset = Writers(clients=7)
    assert (dataset.num_classes, dataset.num_clients) == (10, 7)
    assert dataset.client(3).number == 3


def test_a_client_is_the_same_in_any_order() -> None:
    first = Writers(clients=4)
    forwards = [first.client(number).load() for number in range(4)]
    second = Writers(clients=4)
    backwards = [second.client(number).load() for number in (3, 2, 1, 0)][::-1]
    assert all(map(same, forwards, backwards))
    client = first.client(0)
    assert same(client.load(), client.load())


def test_a_client_does_not_depend_on_the_size_of_the_population() -> None:
    assert same(Writers(clients=6).client(5).load(), Writers(clients=10**9).client(5).load())


def test_a_client_is_the_same_from_any_thread() -> None:
    dataset = Writers(clients=8)
    alone = [dataset.client(number).load() for number in range(8)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda number: dataset.client(number % 8).load(), range(32)))
    assert all(same(examples, alone[i % 8]) for i, examples in enumerate(together))


def test_another_client_or_seed_is_another_writer() -> None:
    def first_images(examples: Examples) -> torch.Tensor:
        return examples.x[:20]

    one = first_images(Writers().client(0).load())
    assert not torch.equal(one, first_images(Writers().client(1).load()))
    assert not torch.equal(one, first_images(Writers(seed=1).client(0).load()))
    assert not torch.equal(Writers(test_examples=20).test().x, Writers(test_examples=20, seed=1).test().x)


def test_a_population_beyond_memory_costs_nothing() -> None:
    dataset = Writers(clients=10**18)
    last = dataset.client(10**18 - 1)
    assert last.number == 10**18 - 1
    assert not same(last.load(), dataset.client(0).load())


def test_a_client_draws_only_when_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("drawn")

    monkeypatch.setattr("fedq.data.writers._write", fail)
    client = Writers().client(0)
    with pytest.raises(RuntimeError, match="drawn"):
        client.load()


@pytest.mark.parametrize("background", [0.0, 1.0])
def test_examples_are_what_the_protocol_says(background: float) -> None:
    dataset = Writers(examples_per_client=40, test_examples=57, background=background)
    test = dataset.test()
    assert len(test.y) == 57
    for x, y in (dataset.client(0).load(), test):
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.shape == (len(y), 1, 28, 28)
        assert 0 <= x.min() < x.max() <= 1
        assert (x == background).float().mean() > 0.4  # the page itself, exactly
        assert 0 <= y.min() < y.max() <= 9


def test_one_example_is_enough() -> None:
    dataset = Writers(clients=1, examples_per_client=1, test_examples=1)
    assert len(dataset.client(0).load().y) == len(dataset.test().y) == 1


def test_polarity() -> None:
    light, dark = Writers(background=1.0), Writers(background=0.0)
    for a, b in ((light.client(3).load(), dark.client(3).load()), (light.test(), dark.test())):
        assert torch.equal(a.x, 1 - b.x)
        assert torch.equal(a.y, b.y)
    assert light.client(3).load().x[:, :, 0].mean() > 0.9  # the upper edge is background


def test_numbers_of_examples(population: list[Examples]) -> None:
    counts = torch.tensor([float(len(y)) for _, y in population])
    assert 75 <= counts.min() < counts.max() <= 125
    assert counts.mean() == pytest.approx(100, abs=5)
    assert counts.std() > 10


def test_labels_are_uniform_but_for_chance(population: list[Examples]) -> None:
    counts = torch.stack([torch.bincount(y, minlength=10) for _, y in population]).double()
    expected = counts.sum(1, keepdim=True) / 10
    chi_square = ((counts - expected) ** 2 / expected).sum(1)
    assert chi_square.mean() == pytest.approx(9, abs=1.7)  # 4 standard errors: 4 √(2 · 9 / 100)


def test_test_writers_are_not_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    def write(key: Key, n: int) -> tuple[np.ndarray, np.ndarray]:
        keys.append(key)
        return np.zeros((n, 28, 28), np.float32), np.zeros(n, np.int64)

    monkeypatch.setattr("fedq.data.writers._write", write)
    dataset = Writers(examples_per_client=1, background=0.0)
    dataset.test()
    testers = set(keys)
    keys.clear()
    for number in range(dataset.num_clients):
        dataset.client(number).load()
    assert len(testers) == 100  # 100 writers with ten examples each
    assert len(set(keys)) == dataset.num_clients
    assert testers.isdisjoint(keys)


def test_pixels_are_as_dark_as_real_ones(population: list[Examples]) -> None:
    pixels = torch.cat([x for x, _ in population])
    assert pixels.mean() == pytest.approx(0.13, abs=0.02)  # real: 0.132
    assert pixels.std() == pytest.approx(0.30, abs=0.03)  # real: 0.309


def test_the_nearest_image_is_often_by_the_same_writer(
    everything: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    x, y, writer = everything
    hits = torch.tensor(0)
    for digit in range(10):
        of_digit = torch.nonzero(y == digit).squeeze(1)
        distance = torch.cdist(x[of_digit], x[of_digit]).fill_diagonal_(torch.inf)
        hits += (writer[of_digit[distance.argmin(1)]] == writer[of_digit]).sum()
    assert 0.3 < hits / len(y) < 0.5  # real: 0.40 among 30 writers, 0.27 among 120; by chance: 0.01


def test_a_writer_is_known_by_their_style(population: list[Examples]) -> None:
    """The mean images of one half of a writer's examples find the writer's other half among 100."""

    def mean_digits(half: slice) -> torch.Tensor:
        rows = []
        for x, y in population:
            one_hot = torch.nn.functional.one_hot(y[half], 10).float()
            rows.append(one_hot.T @ x[half].flatten(1) / one_hot.sum(0).clamp(min=1)[:, None])
        return torch.stack(rows).flatten(1)  # shape: writers × (digits and pixels)

    distance = torch.cdist(mean_digits(slice(0, None, 2)), mean_digits(slice(1, None, 2)))
    found = distance.argmin(1) == torch.arange(WRITERS)
    assert found.float().mean() > 0.8


def test_digits_of_unseen_writers_can_be_read(
    everything: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    x, y, _ = everything
    test = Writers(clients=WRITERS, background=0.0).test()
    read = y[torch.cdist(test.x.flatten(1), x).argmin(1)]
    accuracy = (read == test.y).float().mean()
    assert 0.7 < accuracy < 0.95  # the digits are neither illegible nor all alike


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("clients", 0, "clients must be at least 1, not 0."),
        ("examples_per_client", 0, "examples_per_client must be at least 1, not 0."),
        ("test_examples", -2, "test_examples must be at least 1, not -2."),
        ("seed", -1, "seed must be at least 0, not -1."),
        ("seed", 2**64, f"seed must be below 2^64, not {2**64}."),
        ("clients", 2**63, f"clients must be below 2^63, not {2**63}."),
        ("background", 0.5, "background must be 1.0 (federated EMNIST) or 0.0 (MNIST), not 0.5."),
    ],
)
def test_bad_arguments(argument: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Writers(**{argument: value})


@pytest.mark.parametrize("number", [-1, 5])
def test_no_such_client(number: int) -> None:
    with pytest.raises(IndexError, match=f"client {number} "):
        Writers(clients=5).client(number)
