"""Reads federated EMNIST from HDF5 files of the real layout, complete and damaged."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fedq.data import tff
from fedq.data.dataset import FederatedDataset
from fedq.data.download import DatasetError
from fedq.data.emnist import Emnist

REAL = Path(__file__).resolve().parents[3] / "shared/data/mnist_writers"
SIZES = {"writer_c": 5, "writer_a": 3, "writer_b": 0}  # not in the order of their names
TRAIN, TEST = "fed_emnist_digitsonly_train.h5", "fed_emnist_digitsonly_test.h5"


def images(client_id: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([seed, *client_id.encode()])
    return random.random((n, 28, 28), dtype=np.float32), random.integers(0, 10, n, dtype=np.int32)


def write(path: Path, sizes: dict[str, int], seed: int) -> None:
    with h5py.File(path, "w", track_order=True) as file:
        clients = file.create_group("examples", track_order=True)
        for client_id, n in sizes.items():
            pixels, label = images(client_id, n, seed)
            clients.create_dataset(f"{client_id}/pixels", data=pixels, compression="gzip" if n else None)
            clients.create_dataset(f"{client_id}/label", data=label)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / TRAIN, SIZES, seed=0)
    write(tmp_path / TEST, {"writer_b": 0, "writer_c": 2, "writer_a": 1}, seed=1)
    return tmp_path


def test_clients_are_numbered_by_sorted_id(folder: Path) -> None:
    dataset: FederatedDataset = Emnist(str(folder))
    assert (dataset.num_clients, dataset.num_classes) == (3, 10)
    assert isinstance(dataset, Emnist) and dataset.client_ids == ["writer_a", "writer_b", "writer_c"]
    for number, client_id in enumerate(dataset.client_ids):
        client = dataset.client(number)
        x, y = client.load()
        pixels, label = images(client_id, SIZES[client_id], seed=0)
        assert client.number == number
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.shape == (SIZES[client_id], 1, 28, 28) and y.shape == (SIZES[client_id],)
        assert torch.equal(x[:, 0], torch.from_numpy(pixels)) and y.tolist() == label.tolist()


@pytest.mark.parametrize("number", [-1, 3])
def test_there_is_no_such_client(folder: Path, number: int) -> None:
    with pytest.raises(IndexError, match=f"no client {number}: the numbers are 0 to 2"):
        Emnist(str(folder)).client(number)


def test_a_client_without_examples_has_empty_tensors(folder: Path) -> None:
    x, y = Emnist(str(folder)).client(1).load()
    assert x.shape == (0, 1, 28, 28) and y.shape == (0,)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_test_set_is_that_of_all_clients(folder: Path) -> None:
    x, y = Emnist(str(folder)).test()
    parts = [images("writer_a", 1, seed=1), images("writer_b", 0, seed=1), images("writer_c", 2, seed=1)]
    assert (x.dtype, y.dtype, x.shape) == (torch.float32, torch.int64, (3, 1, 28, 28))
    assert np.array_equal(x[:, 0].numpy(), np.concatenate([pixels for pixels, _ in parts]))
    assert np.array_equal(y.numpy(), np.concatenate([label for _, label in parts]))


def test_background_turns_the_polarity(folder: Path) -> None:
    as_is, turned = Emnist(str(folder)), Emnist(str(folder), background=0.0)
    for a, b in [(as_is.client(2).load(), turned.client(2).load()), (as_is.test(), turned.test())]:
        assert torch.equal(b.x, 1 - a.x) and torch.equal(b.y, a.y)
    with pytest.raises(ValueError, match="background must be 0.0 or 1.0, not 0.5"):
        Emnist(str(folder), background=0.5)


def test_the_caller_may_change_loaded_tensors(folder: Path) -> None:
    dataset = Emnist(str(folder))
    for load in (dataset.client(0).load, dataset.test):
        x, y = load()
        before = x.clone(), y.clone()
        x.fill_(7), y.fill_(7)
        again = load()
        assert torch.equal(again.x, before[0]) and torch.equal(again.y, before[1])


def test_threads_read_what_one_reads(tmp_path: Path) -> None:
    for seed, name in enumerate((TRAIN, TEST)):
        write(tmp_path / name, {f"writer{i}": 1 + i for i in range(20)}, seed)
    dataset = Emnist(str(tmp_path))
    numbers = [i % 20 for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: dataset.client(number).load(), numbers))
    for number, (x, y) in zip(numbers, found, strict=True):
        client_id = dataset.client_ids[number]
        pixels, label = images(client_id, int(client_id.removeprefix("writer")) + 1, seed=0)
        assert np.array_equal(x[:, 0].numpy(), pixels) and y.tolist() == label.tolist()


def test_62_classes_have_their_own_files(folder: Path) -> None:
    with pytest.raises(DatasetError, match="fed_emnist_train.h5 is missing."):
        Emnist(str(folder), only_digits=False)
    for name in ("train", "test"):
        shutil.copy(folder / TRAIN, folder / f"fed_emnist_{name}.h5")
    with h5py.File(folder / "fed_emnist_train.h5", "a") as file:
        file["examples/writer_a/label"][:] = [0, 36, 61]
    dataset = Emnist(str(folder), only_digits=False)
    assert dataset.num_classes == 62
    assert dataset.client(0).load().y.tolist() == [0, 36, 61]


def test_only_the_client_asked_for_is_read(folder: Path) -> None:
    with h5py.File(folder / TRAIN, "a") as file:
        del file["examples/writer_c/label"]
    with h5py.File(folder / TEST, "a") as file:
        del file["examples/writer_c/label"]
    dataset = Emnist(str(folder))
    dataset.client(2)
    assert len(dataset.client(0).load().y) == 3
    with pytest.raises(DatasetError, match=f"{TEST}: client 'writer_c' has no array 'label'."):
        dataset.test()


def replaced(name: str, data: object) -> Callable[[h5py.Group], None]:
    def change(client: h5py.Group) -> None:
        del client[name]
        client[name] = data

    return change


ZEROS = np.zeros((3, 28, 28), np.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda client: client.pop("pixels"), "has no array 'pixels'."),
        (lambda client: client.pop("label"), "has no array 'label'."),
        (lambda client: [client.pop("label"), client.create_group("label")], "has no array 'label'."),
        (replaced("pixels", ZEROS.astype(np.float64)), "has 'pixels' as float64 (3, 28, 28), not float32"),
        (replaced("pixels", ZEROS.astype(np.uint8)), "has 'pixels' as uint8"),
        (replaced("pixels", ZEROS.astype(">f4")), "has 'pixels' as >f4"),
        (replaced("pixels", ZEROS.reshape(3, 784)), "(3, 784), not float32 ('N', 28, 28)."),
        (replaced("pixels", h5py.Empty("f4")), "has 'pixels' as float32 None"),
        (replaced("label", np.zeros(3, np.float32)), "has 'label' as float32 (3,), not int32 ('N',)."),
        (replaced("label", np.zeros((3, 1), np.int32)), "has 'label' as int32 (3, 1)"),
        (replaced("label", np.int32(3)), "has 'label' as int32 ()"),
        (replaced("label", np.zeros(2, np.int32)), "has 3 of 'pixels' and 2 of 'label'."),
        (replaced("label", np.array([0, 1, 10], np.int32)), "has labels outside 0 to 9."),
        (replaced("label", np.array([0, 1, -1], np.int32)), "has labels outside 0 to 9."),
        (replaced("pixels", ZEROS - 0.1), "has pixels outside [0, 1]."),
        (replaced("pixels", ZEROS + 255), "has pixels outside [0, 1]."),
        (replaced("pixels", ZEROS * np.nan), "has pixels outside [0, 1]."),
    ],
)
@pytest.mark.parametrize("name", [TRAIN, TEST])
def test_a_damaged_client_is_named(folder: Path, name: str, change: Callable[[h5py.Group], None], says: str) -> None:
    shutil.copy(folder / TRAIN, folder / TEST)
    with h5py.File(folder / name, "a") as file:
        change(file["examples/writer_a"])
    dataset = Emnist(str(folder))
    with pytest.raises(DatasetError, match=re.escape(f"{folder / name}: client 'writer_a' ")) as caught:
        dataset.client(0).load()
        dataset.test()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_client_that_is_no_group_is_named(folder: Path) -> None:
    with h5py.File(folder / TRAIN, "a") as file:
        replaced("writer_a", ZEROS)(file["examples"])
    with pytest.raises(DatasetError, match="'writer_a' has no array 'pixels'."):
        Emnist(str(folder)).client(0).load()


@pytest.mark.parametrize("link", ["examples/writer_a", "examples/writer_a/label", "examples/writer_a/pixels"])
@pytest.mark.parametrize("name", [TRAIN, TEST])
def test_a_link_to_itself_is_named(folder: Path, name: str, link: str) -> None:
    with h5py.File(folder / name, "a") as file:
        del file[link]
        file[link] = h5py.SoftLink(f"/{link}")
    dataset = Emnist(str(folder))
    with pytest.raises(DatasetError, match=f"{name}: client 'writer_a' cannot be read .*too many links"):
        dataset.client(0).load()
        dataset.test()


@pytest.mark.parametrize("name", [TRAIN, TEST])
def test_a_sparse_client_that_fits_no_memory_is_named(folder: Path, name: str) -> None:
    with h5py.File(folder / name, "a") as file:
        client = file["examples/writer_a"]
        for array, dtype, shape in (("pixels", "f4", (28, 28)), ("label", "i4", ())):
            del client[array]
            client.create_dataset(array, (2**40, *shape), dtype, chunks=(1000, *shape))  # takes no space in the file
    dataset = Emnist(str(folder))
    with pytest.raises(DatasetError, match=f"{name}: client 'writer_a' has [0-9,]+ bytes of 'pixels'"):
        dataset.client(0).load()
        dataset.test()


def test_damaged_bytes_are_reported(folder: Path) -> None:
    with h5py.File(folder / TRAIN, "r") as file:
        chunk = file["examples/writer_a/pixels"].id.get_chunk_info(0)
    content = bytearray((folder / TRAIN).read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 0x55
    (folder / TRAIN).write_bytes(content)
    dataset = Emnist(str(folder))
    with pytest.raises(DatasetError, match=f"{TRAIN}: client 'writer_a' cannot be read"):
        dataset.client(0).load()
    assert len(dataset.client(2).load().y) == 5


@pytest.mark.parametrize("name", [TRAIN, TEST])
@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "truncated"])
def test_a_damaged_file_is_named(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes({"empty": b"", "garbage": b"x" * 5000, "truncated": content[:-100]}[kind])
    says = "is missing" if kind == "missing" else "cannot be read"
    with pytest.raises(DatasetError, match=re.escape(f"{path} {says}")) as caught:
        Emnist(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [TRAIN, TEST])
@pytest.mark.parametrize("content", ["none", "array", "no clients"])
def test_a_file_without_clients_is_named(folder: Path, name: str, content: str) -> None:
    with h5py.File(folder / name, "w") as file:
        if content == "array":
            file["examples"] = ZEROS
        elif content == "no clients":
            file.create_group("examples")
    with pytest.raises(DatasetError, match=re.escape(f"{folder / name} has no group 'examples'")):
        Emnist(str(folder))


def test_without_path_the_files_come_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQ_CACHE", str(folder))
    monkeypatch.setattr(tff, "URL", "http://127.0.0.1:9/")  # no server answers at this address
    assert Emnist().client_ids == ["writer_a", "writer_b", "writer_c"]
    monkeypatch.setenv("no_proxy", "*")
    (folder / TEST).unlink()
    with pytest.raises(DatasetError, match="http://127.0.0.1:9/fed_emnist_digitsonly.tar.bz2 could not be"):
        Emnist()
    with pytest.raises(DatasetError, match="http://127.0.0.1:9/fed_emnist.tar.bz2 could not be fetched"):
        Emnist(only_digits=False)


@pytest.mark.parametrize("only_digits", [True, False])
def test_archives_are_tensorflow_federateds(only_digits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def obtain(*arguments: object) -> Path:
        asked.append(arguments)
        raise DatasetError

    monkeypatch.setattr(tff, "obtain", obtain)
    with pytest.raises(DatasetError):
        Emnist(only_digits=only_digits)
    prefix, sha256 = {
        True: ("fed_emnist_digitsonly", "55333deb8546765427c385710ca5e7301e16f4ed8b60c1dc5ae224b42bd5b14b"),
        False: ("fed_emnist", "fe1ed5a502cea3a952eb105920bff8cffb32836b5173cb18a57a32c3606f3ea0"),
    }[only_digits]
    url = f"https://storage.googleapis.com/tff-datasets-public/{prefix}.tar.bz2"
    assert asked == [(url, sha256, (f"{prefix}_train.h5", f"{prefix}_test.h5"))]


def test_real_writers() -> None:
    if not (REAL / TRAIN).exists():
        pytest.skip(f"the real writers are not in {REAL}")
    dataset = Emnist(str(REAL))
    assert dataset.num_clients == len(dataset.client_ids) == 120
    assert dataset.client_ids == sorted(dataset.client_ids)
    clients = [dataset.client(number).load() for number in range(120)]
    test = dataset.test()
    assert sum(len(y) for _, y in clients) == 12_077
    assert test.x.shape == (1281, 1, 28, 28) and test.y.shape == (1281,)
    for x, y in (*clients, test):
        assert x.shape == (len(y), 1, 28, 28) and x.min() >= 0 and x.max() == 1
        assert (x.numpy() == 1).mean() > 0.5  # background
        assert y.min() >= 0 and y.max() <= 9
    assert set(test.y.tolist()) == set(range(10))
