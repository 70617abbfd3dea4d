"""Small files in TensorFlow Federated's layouts: examples, and damage of all kinds."""

import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torchvision
from tff_files import cifar100_files, many_clients, shakespeare_files, stackoverflow_files, strings, write_clients

from fedq.data import tff
from fedq.data.characters import BEGIN, CHARACTERS, END, OTHER
from fedq.data.dataset import FederatedDataset
from fedq.data.download import DatasetError
from fedq.data.fed_cifar100 import FedCifar100
from fedq.data.stackoverflow import StackOverflow
from fedq.data.tff import TffDataset
from fedq.data.tff_shakespeare import TffShakespeare

MAKERS: dict[type[TffDataset], Callable[[Path], None]] = {
    TffShakespeare: shakespeare_files,
    StackOverflow: stackoverflow_files,
    FedCifar100: cifar100_files,
}
NAMES = {TffShakespeare: "shakespeare", StackOverflow: "stackoverflow", FedCifar100: "fed_cifar100"}


def stored(path: Path, client_id: str, name: str) -> np.ndarray:
    with h5py.File(path, "r") as file:
        return file[f"examples/{client_id}/{name}"][()]


def character(i: int) -> bytes:
    return {0: b"", OTHER: b"?", BEGIN: b"<", END: b">"}.get(i) or CHARACTERS[i - 1 : i]


@pytest.mark.parametrize("kind", MAKERS)
def test_clients_are_numbered_by_sorted_id_and_read_alone(tmp_path: Path, kind: type[TffDataset]) -> None:
    MAKERS[kind](tmp_path)
    dataset: FederatedDataset = kind(str(tmp_path))
    assert isinstance(dataset, kind) and dataset.num_clients == 4
    assert dataset.client_ids == sorted(dataset.client_ids)
    with h5py.File(tmp_path / f"{NAMES[kind]}_train.h5", "r") as file:
        assert sorted(file["examples"]) == dataset.client_ids
    for number in range(4):
        client = dataset.client(number)
        x, y = client.load()
        assert client.number == number and client.examples == len(x) == len(y) > 0
        assert y.dtype == torch.int64 and y.min() >= 0 and y.max() < dataset.num_classes
    for number in (-1, 4):
        with pytest.raises(IndexError, match=f"no client {number}: the numbers are 0 to 3"):
            dataset.client(number)


@pytest.mark.parametrize("kind", MAKERS)
def test_own_test_examples_are_those_of_the_same_id(tmp_path: Path, kind: type[TffDataset]) -> None:
    MAKERS[kind](tmp_path)
    with h5py.File(tmp_path / f"{NAMES[kind]}_test.h5", "a") as file:
        ids = sorted(file["examples"])
        del file["examples"][ids[0]]
        file["examples"].move(ids[3], f"{ids[3]}0")  # a longer id is another client
    dataset = kind(str(tmp_path))
    own = [dataset.client(number).test for number in range(4)]
    assert [load is None for load in own] == [True, False, False, True]
    everything, (first, second) = dataset.test(), [load() for load in own if load]
    assert torch.equal(everything.x[: len(first.x)], first.x)
    assert torch.equal(everything.y[len(first.y) :][: len(second.y)], second.y)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_caller_may_change_loaded_tensors(tmp_path: Path, kind: type[TffDataset]) -> None:
    MAKERS[kind](tmp_path)
    dataset = kind(str(tmp_path))
    for load in (dataset.client(0).load, dataset.test):
        x, y = load()
        before = x.clone(), y.clone()
        x.fill_(7)
        assert torch.equal(y, before[1])  # x and y share no memory
        y.fill_(8)
        again = load()
        assert torch.equal(again.x, before[0]) and torch.equal(again.y, before[1])


def test_speeches_become_sequences_of_80_characters(tmp_path: Path) -> None:
    speeches = [b"Ay, my lord.", b"y" * 79, b"z" * 80, "déjà\n".encode(), b""]
    users = {"B": {"snippets": strings(speeches)}, "A": {"snippets": strings([])}}
    for part in ("train", "test"):
        write_clients(tmp_path / f"shakespeare_{part}.h5", users)
    dataset = TffShakespeare(str(tmp_path))
    x, y = dataset.client(1).load()
    assert x.shape == y.shape == (6, 80) and x.dtype == torch.int64
    inputs, targets = ([b"".join(map(character, row.tolist())) for row in rows] for rows in (x, y))
    assert targets == [b"Ay, my lord.>", b"y" * 79 + b">", b"z" * 80, b">", b"d??j??\n>", b">"]
    assert inputs == [b"<Ay, my lord.>", b"<" + b"y" * 79, b"<" + b"z" * 79, b"z>", b"<d??j??\n>", b"<>"]
    assert dataset.client(1).examples == 6 and torch.equal(dataset.test().x, x)
    assert dataset.client(0).examples == 0 and dataset.client(0).load().x.shape == (0, 80)


def test_sentences_become_sequences_of_20_words(tmp_path: Path) -> None:
    stackoverflow_files(tmp_path)
    sentences = [
        "w1 w10000 w10001",
        " ".join(["w2"] * 19),
        " ".join(["w3"] * 20),
        " ".join(f"w{i}" for i in range(1, 41)),
        "",
    ]
    write_clients(tmp_path / "stackoverflow_train.h5", {"7": {"tokens": strings(sentences)}})
    dataset = StackOverflow(str(tmp_path))
    x, y = dataset.client(0).load()
    assert (dataset.num_classes, x.shape, x.dtype) == (10_004, (5, 20), torch.int64)
    other, begin, end = 10_001, 10_002, 10_003
    rows = [
        [begin, 1, 10_000, other, end] + [0] * 16,
        [begin] + [2] * 19 + [end],
        [begin] + [3] * 20,  # no end: 20 words or more
        [begin, *range(1, 21)],
        [begin, end] + [0] * 19,
    ]
    assert torch.equal(x, torch.tensor(rows)[:, :-1]) and torch.equal(y, torch.tensor(rows)[:, 1:])
    small = StackOverflow(str(tmp_path), words=3, client_examples=2)
    assert small.num_classes == 7 and small.client(0).examples == 2
    assert small.client(0).load().y[:, :3].tolist() == [[1, 4, 4], [2, 2, 2]]


def test_validation_is_of_users_who_are_held_out(tmp_path: Path) -> None:
    stackoverflow_files(tmp_path)
    dataset = StackOverflow(str(tmp_path))
    held_out, test = dataset.validation(), dataset.test()
    shutil.copytree(tmp_path, tmp_path / "copy")
    shutil.copy(tmp_path / "stackoverflow_held_out.h5", tmp_path / "copy/stackoverflow_test.h5")
    copy = StackOverflow(f"{tmp_path}/copy").test()
    assert torch.equal(held_out.x, copy.x) and torch.equal(held_out.y, copy.y) and len(held_out.y)
    assert not torch.equal(held_out.x[:1], test.x[:1])


def test_a_limited_test_set_is_spread_over_the_clients(tmp_path: Path) -> None:
    users = {f"{i:03d}": {"tokens": strings([f"w{i + 1}"] * 12)} for i in range(100)}
    stackoverflow_files(tmp_path)
    write_clients(tmp_path / "stackoverflow_test.h5", users)

    def found(most: int | None) -> list[int]:
        x, y = StackOverflow(str(tmp_path), test_examples=most).test()
        assert len(x) == len(y)
        return (y[:, 0] - 1).tolist()

    assert found(50) == [user for user in range(0, 100, 20) for _ in range(10)]
    assert found(45) == [user for user in range(0, 100, 20) for _ in range(9)]
    assert found(47) == found(50)[:47]
    assert found(None) == found(10**6) == [user for user in range(100) for _ in range(12)]
    assert found(1) == [0]


def test_images_become_floats_with_channels_first(tmp_path: Path) -> None:
    cifar100_files(tmp_path)
    dataset = FedCifar100(str(tmp_path))
    x, y = dataset.client(2).load()
    image, label = (stored(tmp_path / "fed_cifar100_train.h5", "2", name) for name in ("image", "label"))
    assert (dataset.num_classes, x.dtype, x.shape) == (100, torch.float32, (6, 3, 32, 32)) and x.is_contiguous()
    assert np.array_equal(np.rint(x.numpy() * 255), image.transpose(0, 3, 1, 2)) and x.max() <= 1
    assert y.tolist() == label.tolist()
    assert dataset.test().x.shape == (24, 3, 32, 32)
    mean, std = [0.1, 0.2, 0.3], [0.5, 2.0, 4.0]
    ours = FedCifar100(str(tmp_path), mean, std).client(2).load().x
    assert torch.equal(ours, torchvision.transforms.functional.normalize(x, mean, std))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(TffShakespeare, "test_examples"), (StackOverflow, "test_examples"), (StackOverflow, "client_examples")],
)
def test_a_limit_below_one_is_refused(tmp_path: Path, kind: type[TffDataset], name: str) -> None:
    MAKERS[kind](tmp_path)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        kind(str(tmp_path), **{name: 0})


def replaced(name: str, data: object) -> Callable[[h5py.Group], None]:
    def change(client: h5py.Group) -> None:
        del client[name]
        client[name] = data

    return change


def sparse(name: str, dtype: object, shape: tuple[int, ...] = ()) -> Callable[[h5py.Group], None]:
    def change(client: h5py.Group) -> None:
        del client[name]
        client.create_dataset(name, (2**40, *shape), dtype, chunks=(1000, *shape))  # takes no space in the file

    return change


TEXT = h5py.string_dtype("ascii")
IMAGES = np.zeros((6, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (TffShakespeare, lambda client: client.pop("snippets"), "has no array 'snippets'."),
        (TffShakespeare, replaced("snippets", np.zeros(3)), "has 'snippets' as float64 (3,), not bytes ('N',)."),
        (TffShakespeare, replaced("snippets", strings([["a"]])), "has 'snippets' as object (1, 1), not bytes"),
        (TffShakespeare, sparse("snippets", TEXT), "has 8,796,093,022,208 bytes of 'snippets': at most 268,"),
        (StackOverflow, lambda client: client.pop("tokens"), "has no array 'tokens'."),
        (StackOverflow, replaced("tokens", np.zeros(3, np.int64)), "has 'tokens' as int64 (3,), not bytes ('N',)."),
        (StackOverflow, replaced("tokens", h5py.SoftLink("/examples/00000000/tokens")), "cannot be read "),
        (FedCifar100, lambda client: client.pop("label"), "has no array 'label'."),
        (FedCifar100, replaced("image", IMAGES / 255), "has 'image' as float64 (6, 32, 32, 3), not uint8"),
        (FedCifar100, replaced("image", IMAGES[:, :24]), "has 'image' as uint8 (6, 24, 32, 3)"),
        (FedCifar100, replaced("label", np.zeros(6)), "has 'label' as float64 (6,), not integer ('N',)."),
        (FedCifar100, replaced("label", np.zeros(5, int)), "has 6 of 'image' and 5 of 'label'."),
        (FedCifar100, replaced("label", np.full(6, 100)), "has labels outside 0 to 99."),
        (FedCifar100, replaced("label", np.full(6, -1)), "has labels outside 0 to 99."),
        (FedCifar100, replaced("image", h5py.SoftLink("/examples/0/image")), "cannot be read "),
        (FedCifar100, sparse("image", np.uint8, (32, 32, 3)), "has 1099511627776 of 'image' and 6 of 'label'."),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_damaged_client_is_named(
    tmp_path: Path, kind: type[TffDataset], change: Callable[[h5py.Group], None], says: str, part: str
) -> None:
    MAKERS[kind](tmp_path)
    path = tmp_path / f"{NAMES[kind]}_{part}.h5"
    with h5py.File(path, "a") as file:
        client_id = min(file["examples"])
        change(file["examples"][client_id])
    dataset = kind(str(tmp_path))
    with pytest.raises(DatasetError, match=re.escape(f"{path}: client {client_id!r} {says}")) as caught:
        dataset.client(0).load()
        dataset.test()
    assert "\n" not in str(caught.value)


def test_a_sparse_user_is_read_as_far_as_the_limit(tmp_path: Path) -> None:
    stackoverflow_files(tmp_path)
    with h5py.File(tmp_path / "stackoverflow_train.h5", "a") as file:
        sparse("tokens", TEXT)(file["examples/00000000"])
    client = StackOverflow(str(tmp_path)).client(0)
    assert client.examples == 1000 and client.load().x.shape == (1000, 20)


def test_strings_of_fixed_length_are_read(tmp_path: Path) -> None:
    stackoverflow_files(tmp_path)
    write_clients(tmp_path / "stackoverflow_train.h5", {"7": {"tokens": np.array([b"w1 w2", b"w3"])}})
    assert StackOverflow(str(tmp_path)).client(0).load().y[:, :3].tolist() == [[1, 2, 10_003], [3, 10_003, 0]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read "),
        ("w1 5\nw2\nw3 4\n", "has no word and count in line 2."),
        ("w1 5\nw2 x\nw3 4\n", "has no word and count in line 2."),
        ("w1 5\nw2 4\n", "has 2 words: set dataset.words to at most 2."),
        ("\0\xff" * 1000, "has no word and count in line 1."),
    ],
)
def test_a_damaged_word_count_is_named(tmp_path: Path, content: str | None, says: str) -> None:
    stackoverflow_files(tmp_path)
    path = tmp_path / "stackoverflow.word_count"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DatasetError, match=re.escape(f"{path} {says}")):
        StackOverflow(str(tmp_path), words=3)


@pytest.mark.parametrize("kind", MAKERS)
def test_without_path_the_files_come_from_the_cache_or_one_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TffDataset]
) -> None:
    monkeypatch.setenv("FEDQ_CACHE", str(tmp_path))
    monkeypatch.setattr(tff, "URL", "http://127.0.0.1:9/")  # no server answers at this address
    monkeypatch.setenv("no_proxy", "*")
    MAKERS[kind](tmp_path)
    assert kind().num_clients == 4
    (tmp_path / f"{NAMES[kind]}_test.h5").unlink()
    with pytest.raises(DatasetError, match=f"http://127.0.0.1:9/{NAMES[kind]}.tar.bz2 could not be fetched") as caught:
        kind()
    assert "\n" not in str(caught.value)


ARCHIVES = {
    TffShakespeare: {
        "shakespeare": ("0285be9906cb5f268092eee4edeeacfc2af4574f2941f7cc2f08a321d7f5c707", ("train.h5", "test.h5"))
    },
    StackOverflow: {
        "stackoverflow": (
            "99eca2f8b8327a09e5fc123979df2d237acbc5e52322f6d86bf523ee47b961a2",
            ("train.h5", "held_out.h5", "test.h5"),
        ),
        "stackoverflow.word_count": ("1dc00256d6e527c54b9756d968118378ae14e6692c0b3b6cad470cdd3f0c519c", ()),
    },
    FedCifar100: {
        "fed_cifar100": ("e8575e22c038ecef1ce6c7d492d7abee7da13b1e1ba9b70a7fc18531ba7590de", ("train.h5", "test.h5"))
    },
}


@pytest.mark.parametrize("kind", MAKERS)
def test_archives_are_tensorflow_federateds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TffDataset]
) -> None:
    asked = []

    def obtain(*arguments: object) -> Path:
        asked.append(arguments)
        return tmp_path

    MAKERS[kind](tmp_path)
    monkeypatch.setattr(tff, "obtain", obtain)
    kind()
    assert asked == [
        (
            f"https://storage.googleapis.com/tff-datasets-public/{name}.tar.bz2",
            sha256,
            tuple(f"{name}_{part}" for part in parts) or (name,),
        )
        for name, (sha256, parts) in ARCHIVES[kind].items()
    ]


def test_342477_clients_start_in_seconds_and_keep_little_memory(tmp_path: Path) -> None:
    stackoverflow_files(tmp_path)
    many_clients(tmp_path / "stackoverflow_train.h5", "00000001", 342_477)
    started = time.process_time()  # CPU time of this process, because other tests slow it down
    dataset = StackOverflow(str(tmp_path))
    first, last = dataset.client(0).load(), dataset.client(342_476).load()
    assert time.process_time() - started < 10
    assert dataset.num_clients == 342_477
    assert torch.equal(last.y, dataset.client(1).load().y) and not torch.equal(first.y[:1], last.y[:1])
    del dataset
    tracemalloc.start()
    try:
        dataset = StackOverflow(str(tmp_path))
        assert dataset.client(342_476).load()
        assert tracemalloc.get_traced_memory()[0] < 20 * 342_477  # an id takes 8 bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("way", ["link", "raw", "virtual"])
def test_a_file_reads_no_other_file_of_the_machine(tmp_path: Path, way: str) -> None:
    cifar100_files(tmp_path / "other")
    cifar100_files(tmp_path)
    dataset = FedCifar100(str(tmp_path))
    client_id = dataset.client_ids[0]
    rows = len(dataset.client(0).load().y)
    shape, secret = (rows, 32, 32, 3), tmp_path / "secret"
    secret.write_bytes(bytes(rows * 32 * 32 * 3))
    del dataset
    with h5py.File(tmp_path / "fed_cifar100_train.h5", "r+") as file:
        group, other = file[f"examples/{client_id}"], str(tmp_path / "other" / "fed_cifar100_train.h5")
        del group["image"]
        if way == "link":
            group["image"] = h5py.ExternalLink(other, f"/examples/{client_id}/image")
        elif way == "raw":
            group.create_dataset("image", shape, np.uint8, external=[(str(secret), 0, rows * 32 * 32 * 3)])
        else:
            layout = h5py.VirtualLayout(shape, np.uint8)
            layout[:] = h5py.VirtualSource(other, f"/examples/{client_id}/image", shape, np.uint8)
            group.create_virtual_dataset("image", layout)
    expected = f"client {client_id!r} has 'image' in another file, which is not read"
    with pytest.raises(DatasetError, match=re.escape(expected)):
        FedCifar100(str(tmp_path)).client(0).load()


def test_an_array_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    cifar100_files(tmp_path)
    client_id = FedCifar100(str(tmp_path)).client_ids[0]
    with h5py.File(tmp_path / "fed_cifar100_train.h5", "r+") as file:
        group = file[f"examples/{client_id}"]
        for name, (dtype, shape) in {"image": (np.uint8, (32, 32, 3)), "label": (np.int64, ())}.items():
            del group[name]
            group.create_dataset(name, (2**23, *shape), dtype, chunks=True)  # sparse: a few bytes of the file
    expected = f"client {client_id!r} has 25,769,803,776 bytes of 'image': at most 268,435,456 are read"
    with pytest.raises(DatasetError, match=expected):
        FedCifar100(str(tmp_path)).client(0).load()
