"""Labels and sizes of clients: numbers, tables and picture of python -m fedq.data."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedq.data import Client, Examples
from fedq.data.__main__ import main
from fedq.data.download import DatasetError
from fedq.data.mnist5k import Mnist5k
from fedq.data.population import distances, draw, read_population, shares

ROOT = Path(__file__).parents[2]


class Toy:
    """Client i has the targets `targets[i]`."""

    def __init__(self, *targets: torch.Tensor, classes: int = 3) -> None:
        self.targets, self.num_classes, self.num_clients = targets, classes, len(targets)

    def client(self, number: int) -> Client:
        y = self.targets[number]
        return Client(number, lambda: Examples(torch.zeros(len(y), 2), y))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def test_sizes_and_labels_are_counted():
    population = read_population(Toy(torch.tensor([0, 2, 2]), torch.tensor([1]), torch.tensor([0, 0])))
    assert population.sizes.tolist() == [3, 1, 2]
    assert population.labels.tolist() == [[1, 0, 2], [0, 1, 0], [2, 0, 0]]
    assert population.shape == "2, float32"
    assert shares(population.labels)[0].tolist() == [1 / 3, 0, 2 / 3]
    # all clients: (1/2, 1/6, 1/3)
    assert distances(population.labels) == pytest.approx([1 / 3, 5 / 6, 1 / 2])


def test_padding_is_no_label_of_a_sequence():
    population = read_population(Toy(torch.tensor([[1, 2, 0], [1, 0, 0]]), torch.zeros(0, 3, dtype=torch.int64)))
    assert population.labels.tolist() == [[0, 2, 1], [0, 0, 0]]


def test_targets_that_are_no_labels_are_not_counted(tmp_path):
    population = read_population(Toy(torch.rand(3), torch.rand(5)))
    assert population.labels is None and population.sizes.tolist() == [3, 5]
    draw(population, "sizes", tmp_path / "sizes.png")
    assert pixels(tmp_path / "sizes.png").shape == (675, 1650, 3)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(DatasetError, match="client 1 has labels outside 0 to 2"):
        read_population(Toy(torch.tensor([0]), torch.tensor([0, label])))


def test_of_many_clients_the_same_are_drawn():
    dataset = Mnist5k(clients=400)
    population = read_population(dataset, most=20)
    assert len(set(population.numbers.tolist())) == 20 and population.numbers.max() > 200
    assert np.array_equal(read_population(dataset, most=20).numbers, population.numbers)
    assert population.labels.sum() == 200


@pytest.mark.parametrize("classes", [2, 15, 60, 3000])
def test_the_picture_shows_any_number_of_labels(tmp_path, classes):
    targets = [torch.randint(classes, (50,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    draw(read_population(Toy(*targets, classes=classes)), "labels", tmp_path / "labels.png")
    colours = np.unique(pixels(tmp_path / "labels.png").reshape(-1, 3), axis=0)
    assert len(colours) > min(classes, 50)


def test_the_command_prints_tables_of_80_columns_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    main(["mnist5k", "dataset.alpha=0.05", "dataset.clients=50"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert out.startswith("50 clients with 4,000 examples; 1,000 test examples\n")
    assert re.search(r"^ +80 +80 +80 +80 +80 +80$", out, re.MULTILINE)
    assert len(re.findall(r"^\d +10\.0 % +\d+\.0 % +\d+\.\d %$", out, re.MULTILINE)) == 10
    mean = distances(read_population(Mnist5k(clients=50, alpha=0.05)).labels).mean()
    assert f"from all clients' shares: {mean:.2f} of 1" in out
    assert out.endswith("picture: mnist5k.png\n")
    assert pixels(Path("mnist5k.png")).shape == (675, 1650, 3)


def test_the_command_takes_ones_own_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine" / "dataset" / "few.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("defaults: [mnist5k]\nclients: 7\n")
    main(["--picture", "few.svg", "few", "--config-dir", "mine", "dataset.seed=1"])
    assert capsys.readouterr().out.startswith("7 clients with 4,000 examples")
    assert Path("few.svg").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nosuch"], "Could not find 'dataset/nosuch' Available options in 'dataset': cifar10 "),
        (["mnist5k", "dataset.alfa=1"], "dataset.alfa is not a key; allowed here: "),
        (["mnist5k", "dataset.clients=9999"], "dataset: clients must be from 1 to 4000, not 9999"),
        (["leaf"], "dataset.path has no value: set dataset.path=…"),
        (["leaf", "dataset.path=nowhere"], "nowhere/train must hold LEAF's .json files"),
        (["cifar10", "dataset/partition=iid", "dataset.path=nowhere"], "nowhere has no usable CIFAR10"),
        (["mnist5k", "--config-dir", "nowhere"], "--config-dir: nowhere is not a folder"),
        (["mnist5k", "--picture", "nowhere/a.png"], "nowhere/a.png"),
    ],
)
def test_errors_are_one_sentence(tmp_path, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert str(caught.value).startswith("fedq: ") and error in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_module_is_a_command(tmp_path):
    command = [sys.executable, "-m", "fedq.data", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m fedq.data")
