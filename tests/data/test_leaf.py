"""LEAF's JSON files: images as flat lists, and text."""

import json
import re
from pathlib import Path

import pytest
import torch

from fedq.data.characters import VOCABULARY, tokens
from fedq.data.download import DatasetError
from fedq.data.leaf import Leaf
from fedq.errors import FedqError


def write(path: Path, users: dict[str, tuple[list, list]], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
    sizes = [len(y) for _, y in users.values()]
    path.write_text(json.dumps({"users": list(users), "num_samples": sizes, "user_data": data}, **options), "utf-8")


def pixels(user: str, n: int) -> list[list[float]]:
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(len(user))).tolist()


def write_images(folder: Path) -> dict[str, tuple[list, list]]:
    """Writes four users in two files of train, and two users in test, of whom train has one."""
    labels = {"f_10": [3, 0], "f_2": [1.0], "Zoë\n𝔘": [2, 2, 4], 'user_data": {': [1]}
    users = {user: (pixels(user, len(y)), y) for user, y in labels.items()}
    first, second = list(users.items())[:2], list(users.items())[2:]
    write(folder / "train" / "all_data_0.json", dict(first))
    write(folder / "train" / "all_data_1.json", dict(second), ensure_ascii=False, indent=1)
    write(folder / "test" / "all_data_0.json", {"f_2": (pixels("f_2", 2), [0, 1]), "a": (pixels("a", 1), [5])})
    return users


def test_users_are_clients(tmp_path):
    users = write_images(tmp_path)
    dataset = Leaf(str(tmp_path), shape=[1, 2, 3])
    assert (dataset.num_clients, dataset.num_classes) == (4, 6)
    assert dataset.client_ids == sorted(users)
    for number, user in enumerate(sorted(users)):
        client, (x, y) = dataset.client(number), users[user]
        assert (client.number, client.examples) == (number, len(y))
        assert torch.equal(client.load().x, torch.tensor(x).reshape(-1, 1, 2, 3))
        assert torch.equal(client.load().y, torch.tensor(y).long())
        assert (client.test is None) == (user != "f_2")
    assert dataset.client(sorted(users).index("f_2")).test().y.tolist() == [0, 1]
    assert dataset.test().y.tolist() == [5, 0, 1]  # users a and f_2
    assert Leaf(str(tmp_path)).client(0).load().x.shape == (3, 6)
    with pytest.raises(IndexError, match="there is no client 4: the numbers are 0 to 3"):
        dataset.client(4)


def test_only_the_clients_part_of_a_file_is_read(tmp_path):
    users = write_images(tmp_path)
    dataset = Leaf(str(tmp_path))
    path = tmp_path / "train" / "all_data_0.json"
    data = path.read_bytes()
    place = data.index(b'"f_2": {')
    path.write_bytes(bytes(place) + data[place:])  # damages the user f_10, whose bytes come first
    assert dataset.client(dataset.client_ids.index("f_2")).load().y.tolist() == users["f_2"][1]
    expected = f"{path}: user 'f_10' cannot be read ("
    with pytest.raises(DatasetError, match="^" + re.escape(expected)):
        dataset.client(dataset.client_ids.index("f_10")).load()


def test_classes_may_be_more_than_the_labels(tmp_path):
    write_images(tmp_path)
    assert Leaf(str(tmp_path), classes=62).num_classes == 62
    with pytest.raises(ValueError, match=r"classes must be at least 6, not 5: .* has the label 5"):
        Leaf(str(tmp_path), classes=5)


def test_text_becomes_tokens_and_next_tokens(tmp_path):
    speech = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer"
    text = {"HAMLET": ([speech[i : i + 80] for i in range(3)], [speech[i + 80] for i in range(3)])}
    write(tmp_path / "train" / "a.json", text)
    write(tmp_path / "test" / "a.json", text)
    dataset = Leaf(str(tmp_path))
    x, y = dataset.client(0).load()
    assert (dataset.num_classes, dataset.client(0).examples) == (VOCABULARY, 3)
    ids = torch.from_numpy(tokens(speech.encode())).long()
    assert torch.equal(x, torch.stack([ids[i : i + 80] for i in range(3)]))
    assert torch.equal(y, torch.stack([ids[i + 1 : i + 81] for i in range(3)]))


@pytest.mark.parametrize(
    ("x", "y", "error"),
    [
        ([[0.0]], [0.5], "user 'u': y must be labels from 0 to 2^31 - 1, or text if x is text, not 0.5"),
        ([[0.0]], [-1], "user 'u': y must be labels from 0 to 2^31 - 1, or text if x is text, not -1"),
        ([[0.0]], ["a"], "user 'u': y must be labels from 0 to 2^31 - 1, or text if x is text, not 'a'"),
        ([[0.0]], [[1]], "user 'u': y must be labels from 0 to 2^31 - 1, or text if x is text, not [1]"),
        ([[0.0]], [float("inf")], "not inf"),
        ([[0.0]], [2**31], "not 2147483648"),
        ([[0.0]], [1e300], "not 1e+300"),
        ([[0.0]], [0, 1], "user 'u': 1 x but 2 y"),
        ({}, [0, 1], "user 'u': x and y must be lists"),
    ],
)
def test_wrong_examples_are_one_sentence(tmp_path, x, y, error):
    write_images(tmp_path)
    write(tmp_path / "train" / "u.json", {"u": (x, y)})
    with pytest.raises(DatasetError, match=f"/train/u.json is not a readable file of LEAF .*{re.escape(error)}"):
        Leaf(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"user_data": 3}', '{"user_data": {"u": {"x": [1', '{"user_data": {"u"', '{"user_data": {5: {}}}'],
)
def test_damaged_files_are_one_sentence(tmp_path, text):
    write_images(tmp_path)
    (tmp_path / "test" / "u.json").write_text(text)
    with pytest.raises(DatasetError, match=r"/test/u\.json is not a readable file of LEAF \(.+\)\.$"):
        Leaf(str(tmp_path))


def test_other_faults_are_one_sentence(tmp_path):
    with pytest.raises(DatasetError, match="/train must hold LEAF's .json files with users in them"):
        Leaf(str(tmp_path))
    write_images(tmp_path)
    six = [0.0] * 5
    for x in (
        *([[0.0, 1.0], [1.0]], [[1.0], [0.0]], ["a", [0.0]]),
        *([[*six, wrong]] * 2 for wrong in (None, "1", float("nan"), float("inf"), 10**400)),
    ):
        write(tmp_path / "train" / "u.json", {"u": (x, [0, 1])})
        dataset = Leaf(str(tmp_path), shape=[1, 2, 3])
        with pytest.raises(DatasetError, match=r"/train/u\.json: user 'u' cannot be read \("):
            dataset.client(dataset.client_ids.index("u")).load()
    write(tmp_path / "train" / "u.json", {"u": (["text"], ["t"])})
    with pytest.raises(DatasetError, match="has labels for some users and text for other users"):
        Leaf(str(tmp_path))
    write(tmp_path / "train" / "u.json", {"f_10": ([[0.0] * 6], [0])})
    with pytest.raises(DatasetError, match=r"/train/u\.json .* \(user 'f_10' is also in .*/all_data_0\.json\)"):
        Leaf(str(tmp_path))
    write(tmp_path / "train" / "u.json", {"u": ([[0.0]], [0])})
    write(tmp_path / "test" / "u.json", {"u": ([[0.0]], [0])})
    with pytest.raises(FedqError, match=re.escape("the inputs of clients are (1,) float32 and (6,) float32: all")):
        Leaf(str(tmp_path)).test()
    with pytest.raises(ValueError, match="classes must be an integer, at least 1, not nan"):
        Leaf(str(tmp_path), classes=float("nan"))
