"""Every dataset of files trains on a small file of the real layout, and with every partition."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import fedq
from data.cifar_files import write_cifar
from encoding.configured import CONF
from PIL import Image
from tff_files import cifar100_files, shakespeare_files, stackoverflow_files

SMALL = """
from pathlib import Path

import torch
import torchvision.datasets.cifar

from fedq.data.vision import torchvision_dataset

torchvision.datasets.cifar.check_integrity = lambda path, md5=None: Path(path).is_file()


class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = torch.nn.Linear(3, num_classes)

    def forward(self, x):
        return self.layer(x.mean((2, 3)))
"""
"""A module that skips the MD5 of CIFAR's files, and has a model of colour images."""

CIFAR = ("dataset._target_=small.torchvision_dataset", "dataset.clients=4", "model._target_=small.Net")
TEXT = ("task=next_token", "model._target_=tiny_models.Bigram")
ROUNDS = ("model=mlp", "run.rounds=2", "run.clients_per_round=2", "encoder.threshold=100")
PARTITIONS = sorted(path.stem for path in Path(CONF, "dataset", "partition").glob("*.yaml"))


def png(seed: int) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path) -> None:
    """Writes eight images of two clients in train, and two in test."""
    for i in range(10):
        path = folder / ("test" if i >= 8 else "train") / f"client {i % 2}" / "ab"[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))


def write_leaf(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        user = {"x": np.random.default_rng(0).random((4, 784)).tolist(), "y": [0, 1, 2, 1]}
        text = json.dumps({"users": ["a", "b"], "num_samples": [4, 4], "user_data": {"a": user, "b": user}})
        (folder / part / "all_data_0_niid_0_keep_0.json").write_text(text)


def write_parquet(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    images = [{"bytes": png(i), "path": None} for i in range(8)]
    table = pa.table({"writer": ["a", "b"] * 4, "image": images, "label": [0, 1, 2, 3] * 2})
    for part in ("train", "test"):
        pq.write_table(table, folder / "data" / f"{part}-00000-of-00001.parquet")


FILES = {  # dataset → (writes its files, further arguments)
    "cifar10": (lambda folder: write_cifar(folder, 10), CIFAR),
    "cifar100": (lambda folder: write_cifar(folder, 100), CIFAR),
    "image_folder": (write_images, ("dataset.shape=[1,28,28]", "dataset.clients=3")),
    "leaf": (write_leaf, ("dataset.shape=[1,28,28]",)),
    "parquet": (
        write_parquet,
        ("dataset.client=writer", "dataset.x=image", "dataset.y=label", "dataset.shape=[1,28,28]"),
    ),
    "fed_cifar100": (cifar100_files, ("model._target_=tiny_models.Colour",)),
    "tff_shakespeare": (shakespeare_files, TEXT),
    "stackoverflow": (stackoverflow_files, TEXT),
}


def prepare(cwd: Path, name: str) -> tuple[str, ...]:
    """Writes the files of a dataset, and returns the arguments of a run of two rounds."""
    (cwd / "small.py").write_text(SMALL)
    write, arguments = FILES[name]
    write(cwd / name)
    return (f"dataset={name}", f"dataset.path={name}", *ROUNDS, *arguments)


def completed(cwd: Path) -> list[float]:
    """Returns the test losses of all runs, which must be completed."""
    summaries = [json.loads(path.read_text()) for path in cwd.rglob("summary.json")]
    assert {summary["status"] for summary in summaries} == {"completed"}
    losses = [json.loads(path.read_text().splitlines()[-1])["test/loss"] for path in cwd.rglob("metrics.jsonl")]
    assert len(losses) == len(summaries) and np.isfinite(losses).all()
    return losses


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Returns the metrics of a run, without seconds."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


@pytest.mark.parametrize("name", FILES)
def test_every_dataset_of_files_trains(tmp_path, name):
    fedq(tmp_path, *prepare(tmp_path, name))
    assert len(completed(tmp_path)) == 1


def test_every_partition_trains(tmp_path):
    others = [name for name in PARTITIONS if name != "natural"]
    fedq(tmp_path, "-m", *prepare(tmp_path, "cifar100"), f"dataset/partition={','.join(others)}")
    fedq(tmp_path, *prepare(tmp_path, "image_folder")[:-1], "dataset/partition=natural")
    losses = completed(tmp_path)
    assert len(set(losses)) == len(losses) == len(PARTITIONS)


def test_inputs_change_alike_for_any_number_of_workers(tmp_path):
    command = (*prepare(tmp_path, "cifar10"), "run.clients_per_round=4")
    for name, changes in {
        "plain": (),
        "one": ("client/augment=crop_and_flip", "run.workers=1"),
        "two": ("client/augment=crop_and_flip", "run.workers=2"),
    }.items():
        fedq(tmp_path, *command, *changes, f"hydra.run.dir={name}")
    plain, one, two = (metrics_of(tmp_path / name) for name in ("plain", "one", "two"))
    assert one == two != plain
