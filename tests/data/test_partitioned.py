"""Map-style datasets, such as torchvision's, with a partition."""

import re
from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from cifar_files import any_md5 as any_md5
from cifar_files import write_cifar
from PIL import Image
from torch.utils.data import TensorDataset

from fedq.data import Partitioned
from fedq.data.dataset import FederatedDataset
from fedq.data.download import DatasetError
from fedq.data.partition import Dirichlet, Iid, Natural, Pachinko
from fedq.data.partitioned import normalised
from fedq.data.vision import COARSE, torchvision_dataset


class Pictures:
    """Map-style: inputs, targets and other attributes as given."""

    def __init__(self, inputs, targets, **attributes):
        self.inputs, self.targets = inputs, targets
        vars(self).update(attributes)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("classes", [10, 100])
def test_any_torchvision_dataset_needs_two_lines(tmp_path, classes):
    pixels = write_cifar(tmp_path, classes)
    source = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]

    train, test = source(tmp_path), source(tmp_path, train=False)
    dataset: FederatedDataset = Partitioned(train, test, Dirichlet(alpha=0.1), clients=7)

    assert (dataset.num_clients, dataset.num_classes) == (7, classes)
    parts = [dataset.client(number).load() for number in range(7)]
    assert [dataset.client(number).examples for number in range(7)] == [len(part.y) for part in parts]
    for part in (*parts, dataset.test()):
        assert (part.x.dtype, part.x.shape[1:], part.y.dtype) == (torch.float32, (3, 32, 32), torch.int64)
        assert torch.equal(part.x[:, 0, 0, 0], part.y / 255)  # the image belongs to the label
    rows = [row.tobytes() for part in parts for row in np.rint(part.x.flatten(1).numpy() * 255).astype(np.uint8)]
    assert Counter(rows) == Counter(row.tobytes() for row in pixels["train"])
    assert np.array_equal(np.rint(dataset.test().x.flatten(1).numpy() * 255).astype(np.uint8), pixels["test"])


@pytest.mark.usefixtures("any_md5")
def test_colours_are_normalised_by_channel(tmp_path):
    write_cifar(tmp_path, 10)
    mean, std = [0.1, 0.2, 0.3], [0.5, 2.0, 4.0]
    plain = torchvision_dataset("CIFAR10", Iid(), 4, str(tmp_path))
    ours = torchvision_dataset("CIFAR10", Iid(), 4, str(tmp_path), mean, std)
    expected = torchvision.transforms.functional.normalize(plain.client(1).load().x, mean, std)
    assert torch.equal(ours.client(1).load().x, expected)
    wrong = torchvision_dataset("CIFAR10", Iid(), 4, str(tmp_path), mean=[0.1, 0.2])
    with pytest.raises(DatasetError, match="mean must have 3 numbers, one a channel, not 2"):
        wrong.test()


@pytest.mark.usefixtures("any_md5")
def test_cifar_100_knows_its_superclasses(tmp_path):
    write_cifar(tmp_path, 100, examples=1000)
    dataset = torchvision_dataset("CIFAR100", Pachinko(alpha=1e-6), 20, str(tmp_path))
    first = [COARSE[dataset.client(number).load().y[:10]] for number in range(20)]
    assert np.mean([len(set(coarse)) == 1 for coarse in first]) > 0.5


def test_superclasses_are_the_papers():
    assert np.bincount(COARSE).tolist() == [5] * 20
    # classes are in the alphabetical order of their names
    trees = {"maple": 47, "oak": 52, "palm": 56, "pine": 59, "willow": 96}
    people = {"baby": 2, "boy": 11, "girl": 35, "man": 46, "woman": 98}
    assert {COARSE[i] for i in trees.values()} == {17} and {COARSE[i] for i in people.values()} == {14}


def test_missing_files_are_fetched_by_torchvision(tmp_path, monkeypatch, any_md5, capsys):
    monkeypatch.setenv("FEDQ_CACHE", str(tmp_path))
    fetched = []

    def download(self):
        print("Files already downloaded and verified")
        if not (self.root / self.base_folder).exists():
            fetched.append(self.root)
            write_cifar(self.root, 10)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    for _ in range(2):
        assert torchvision_dataset("CIFAR10", Iid(), 4).num_clients == 4
    assert fetched == [tmp_path / "torchvision"]
    assert capsys.readouterr().out == ""  # stdout is for results


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FEDQ_CACHE", str(tmp_path))

    def download(self):
        raise URLError("no network")

    monkeypatch.setattr(getattr(torchvision.datasets, name), "download", download)
    expected = f"{tmp_path}/torchvision has no usable {name} (<urlopen error no network>): try again, or "
    with pytest.raises(DatasetError, match="^" + re.escape(expected)) as caught:
        torchvision_dataset(name, Iid(), 4)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_one_sentence(tmp_path):
    for _ in range(2):
        expected = f"{tmp_path} has no usable CIFAR10 (Dataset not found or corrupted."
        with pytest.raises(DatasetError, match=re.escape(expected)):
            torchvision_dataset("CIFAR10", Iid(), 4, str(tmp_path))
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="name must be a class of torchvision.datasets, not Cifar"):
        torchvision_dataset("Cifar", Iid(), 4)


def test_pictures_arrays_and_tensors_become_floats():
    grey, colour = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    for given in (Image.fromarray(colour), colour, torch.from_numpy(colour).permute(2, 0, 1)):
        (x,), _ = Partitioned(Pictures([given], [0]), Pictures([given], [0]), Iid(), clients=1).test()
        assert torch.equal(x, torch.from_numpy(colour).permute(2, 0, 1) / 255)
    (x,), _ = Partitioned(Pictures([grey], [0]), Pictures([grey], [0]), Iid(), clients=1).test()
    assert x.shape == (1, 3, 4)
    floats = Pictures(torch.randn(2, 5), [0, 1])
    assert torch.equal(Partitioned(floats, floats, Iid(), clients=1).test().x, floats.inputs)


def test_a_dataset_without_targets_needs_classes():
    data = TensorDataset(torch.randn(4, 5), torch.tensor([0, 1, 1, 0]))
    with pytest.raises(ValueError, match="the dataset has neither classes nor targets"):
        Partitioned(data, data, Iid(), clients=2)
    data.classes = ["no", "yes"]
    dataset = Partitioned(data, data, Iid(), clients=2)
    assert dataset.num_classes == 2
    assert dataset.test().y.tolist() == [0, 1, 1, 0]


def test_natural_clients_are_an_attribute():
    train = Pictures(torch.arange(4.0).reshape(4, 1), [0, 1, 2, 0], clients=["b", "a", "b", "a"])
    dataset = Partitioned(train, train, Natural())
    assert [dataset.client(i).load().x.flatten().tolist() for i in range(2)] == [[1, 3], [0, 2]]
    with pytest.raises(IndexError, match="there is no client 2: the numbers are 0 to 1"):
        dataset.client(2)


@pytest.mark.parametrize(
    ("targets", "error"),
    [
        ([0.5, 1.0], "labels must be integers, one for each of 2 examples, not float64 (2,)"),
        ([[0, 1], [1, 0]], "labels must be integers, one for each of 2 examples, not int64 (2, 2)"),
        ([0], "labels must be integers, one for each of 2 examples, not int64 (1,)"),
        (["cat", "dog"], "labels must be integers, one for each of 2 examples, not <U3 (2,)"),
        (None, "the dataset has neither classes nor targets"),
    ],
)
def test_labels_that_are_no_classes_are_refused(targets, error):
    pictures = Pictures(torch.zeros(2, 1), targets)
    with pytest.raises(ValueError, match=re.escape(error)):
        Partitioned(pictures, pictures, Iid(), clients=2)


def test_pictures_of_two_sizes_are_named():
    pictures = Pictures([torch.zeros(3, 4, 5), torch.zeros(3, 5, 4)], [0, 1])
    with pytest.raises(DatasetError, match=re.escape("shapes such as (3, 4, 5) and (3, 5, 4); all must have one")):
        Partitioned(pictures, pictures, Iid(), clients=1).client(0).load()


@pytest.mark.parametrize(("std", "mean"), [([0.0], None), ([float("nan")], None), (None, [float("inf")])])
def test_a_mean_or_a_deviation_that_gives_no_numbers_is_refused(std, mean):
    with pytest.raises(DatasetError, match=r"(mean|std) must be finite numbers"):
        normalised(torch.rand(2, 3, 4, 4), mean, std)
