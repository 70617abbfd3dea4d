"""Folders of image files."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedq.data.download import DatasetError
from fedq.data.images import decoded, image_folder
from fedq.data.partition import Iid, Natural, Shards

CLASSES = ["ant", "bee", "cat"]


def write(path: Path, size: tuple[int, int] = (6, 4)) -> np.ndarray:
    """Writes an image whose pixels follow from its path, and returns its pixels (H, W, 3)."""
    pixels = np.random.default_rng(list(str(path).encode())).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def by_class(tmp_path):
    """Images as CLASS/FILE: the classes have two, three and four images."""
    for part in ("train", "test"):
        for i, name in enumerate(CLASSES):
            for j in range(2 + i):
                write(tmp_path / part / name / f"{j}.png")
    return tmp_path


def test_images_by_class_are_partitioned(by_class):
    dataset = image_folder(str(by_class), [3, 6, 4], Shards(1), clients=3)
    assert (dataset.num_clients, dataset.num_classes) == (3, 3)
    parts = [dataset.client(number).load() for number in range(3)]
    assert torch.cat([y for _, y in parts]).bincount().tolist() == [2, 3, 4]
    test = dataset.test()
    assert test.y.tolist() == [0] * 2 + [1] * 3 + [2] * 4
    expected = write(by_class / "test" / "bee" / "1.png")
    assert torch.equal(test.x[3], torch.from_numpy(expected).permute(2, 0, 1) / 255)


def test_folders_of_clients_are_natural_clients(tmp_path):
    sizes = {"zoe": {"bee": 2}, "ann": {"ant": 1, "cat": 3}}
    for client, classes in sizes.items():
        for name, n in classes.items():
            for i in range(n):
                write(tmp_path / "train" / client / name / f"{i}.JPG")
    write(tmp_path / "test" / "cat" / "0.png")
    dataset = image_folder(str(tmp_path), [3, 6, 4], Natural())
    assert (dataset.num_clients, dataset.num_classes) == (2, 3)
    assert [dataset.client(number).load().y.tolist() for number in range(2)] == [[0, 2, 2, 2], [1, 1]]
    assert dataset.test().y.tolist() == [2]
    assert image_folder(str(tmp_path), [3, 6, 4], Iid(), clients=6).num_clients == 6


def test_images_become_one_shape(by_class):
    write(by_class / "train" / "ant" / "large.png", (60, 30))
    x, _ = image_folder(str(by_class), [1, 5, 7], Iid(), clients=1, mean=[0.5], std=[0.25]).client(0).load()
    assert x.shape == (10, 1, 5, 7) and x.dtype == torch.float32
    assert -2 <= x.min() < 0 < x.max() <= 2
    flat = BytesIO()
    Image.new("RGB", (50, 20), (255, 0, 128)).save(flat, "PNG")
    assert (decoded(flat.getvalue(), [3, 8, 8], "here") == (255, 0, 128)).all()
    assert (decoded(flat.getvalue(), [1, 8, 8], "here") == 91).all()  # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B


@pytest.mark.parametrize("shape", [[3, 4], [2, 4, 4], [3, 0, 4]])
def test_other_shapes_are_refused(by_class, shape):
    with pytest.raises(ValueError, match=re.escape(f"with 1 or 3 channels, not {shape}")):
        image_folder(str(by_class), shape, Iid(), clients=2)


def test_faults_of_folders_are_one_sentence(by_class):
    with pytest.raises(ValueError, match="the dataset has no client of each example"):
        image_folder(str(by_class), [3, 6, 4], Natural())
    write(by_class / "test" / "dog" / "0.png")
    with pytest.raises(DatasetError, match=r"/test has the class 'dog', which the training images do not have"):
        image_folder(str(by_class), [3, 6, 4], Iid(), clients=2)
    write(by_class / "train" / "0.png")
    with pytest.raises(DatasetError, match=r"/train must hold images \(.bmp, .*all as CLASS/FILE or all as CLIENT/"):
        image_folder(str(by_class), [3, 6, 4], Iid(), clients=2)
    with pytest.raises(DatasetError, match="no/train is missing"):
        image_folder("no", [3, 6, 4], Iid(), clients=2)


def test_a_damaged_image_is_named(by_class):
    path = by_class / "train" / "bee" / "1.png"
    whole = path.read_bytes()
    dataset = image_folder(str(by_class), [3, 6, 4], Iid(), clients=1)
    for damaged in (b"", b"no image", whole[:50], whole[:40] + bytes(9) + whole[49:]):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=f"^{re.escape(str(path))} is not a readable image"):
            dataset.client(0).load()


def test_an_image_that_would_fill_the_memory_is_refused(by_class, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DatasetError, match=r"is not a readable image \(Image size \(24 pixels\) exceeds limit"):
        image_folder(str(by_class), [3, 6, 4], Iid(), clients=1).client(0).load()
