"""Small files of CIFAR's layout, and torchvision without their MD5."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import cifar


def write_cifar(folder: Path, classes: int, examples: int = 40) -> dict[str, np.ndarray]:
    """Writes the files of CIFAR-10 or CIFAR-100 and returns train and test: rows of pixels (N, 3072), uint8."""
    ten = classes == 10
    root = folder / ("cifar-10-batches-py" if ten else "cifar-100-python")
    root.mkdir(parents=True)
    random = np.random.default_rng(classes)
    pixels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch") if ten else ("train", "test"):
        n = examples // 5 if name.startswith("data") else examples
        data = random.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = (np.arange(n) % classes).tolist()
        data[:, 0] = labels  # the first pixel gives the label
        entry = {"data": data} | ({"labels": labels} if ten else {"fine_labels": labels, "coarse_labels": labels})
        (root / name).write_bytes(pickle.dumps(entry))
        pixels["test" if name.startswith("test") else "train"].append(data)
    names = [f"class {i}" for i in range(classes)]
    meta = ("batches.meta", "label_names") if ten else ("meta", "fine_label_names")
    (root / meta[0]).write_bytes(pickle.dumps({meta[1]: names}))
    return {name: np.concatenate(parts) for name, parts in pixels.items()}


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torchvision read CIFAR files with any MD5."""
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
