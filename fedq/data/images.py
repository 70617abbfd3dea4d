"""Encoded images, and folders of image files split over clients."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fedq.data.download import DatasetError
from fedq.data.partition import Partition
from fedq.data.partitioned import Partitioned

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_MODES = {1: "L", 3: "RGB"}


def check_shape(shape: list[int]) -> None:
    """Raises ValueError unless `shape` is the shape of an image: channels (1 or 3), height, width."""
    if len(shape) != 3 or shape[0] not in _MODES or min(shape) < 1:
        raise ValueError(f"shape must be [channels, height, width] with 1 or 3 channels, not {shape}.")


def decoded(file: bytes, shape: list[int], where: str) -> np.ndarray:
    """Returns an image, uint8, (H, W) or (H, W, 3), converted to grey or colour and stretched to the shape.

    file: the bytes of an image file of any format that Pillow reads.
    shape: channels (1 or 3), height, width.
    where: place of the image, for the error.

    Raises DatasetError if the bytes are damaged.
    """
    channels, height, width = shape
    try:
        image = Image.open(BytesIO(file)).convert(_MODES[channels])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # errors of Pillow
        raise DatasetError(f"{where} is not a readable image ({error}).") from error
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR))


class _Folder:
    """A map-style dataset of images below a folder, …/CLASS/FILE or …/CLIENT/CLASS/FILE, sorted by path."""

    def __init__(self, root: Path, shape: list[int], classes: list[str] | None = None) -> None:
        """Raises DatasetError if the folder lacks images, has images at two depths, or a class not in `classes`."""
        if not root.is_dir():
            raise DatasetError(f"{root} is missing: it must be a folder of images, as CLASS/FILE or CLIENT/CLASS/FILE.")
        self._root, self._shape = root, shape
        found = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        self._files = sorted(found, key=lambda file: file.parts)
        depths = {len(file.parts) for file in self._files}
        if depths not in ({2}, {3}):
            kinds = ", ".join(SUFFIXES)
            raise DatasetError(f"{root} must hold images ({kinds}), all as CLASS/FILE or all as CLIENT/CLASS/FILE.")
        names = [file.parts[-2] for file in self._files]
        self.classes = sorted(set(names)) if classes is None else classes
        if unknown := sorted(set(names) - set(self.classes)):
            raise DatasetError(f"{root} has the class {unknown[0]!r}, which the training images do not have.")
        self.targets = np.array([self.classes.index(name) for name in names])
        self.clients = [file.parts[0] for file in self._files] if depths == {3} else None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self._root / self._files[index]
        return decoded(path.read_bytes(), self._shape, str(path)), int(self.targets[index])


def image_folder(
    path: str,
    shape: list[int],
    partition: Partition,
    clients: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    seed: int = 0,
) -> Partitioned:
    """Returns a dataset of image files, read when a client is loaded.

    path: folder with the folders train and test. Files lie in both as CLASS/FILE, as torchvision.datasets.ImageFolder
        reads them. In train, CLIENT/CLASS/FILE gives the clients of the natural partition.
    shape: channels (1 or 3), height and width, to which each image is converted and stretched.
    partition: splits the images over clients.
    clients: number of clients; None for the natural partition.
    mean: mean of each channel, to subtract.
    std: standard deviation of each channel, to divide by.
    seed: seed of the partition, 0 to 2^64 − 1.

    Raises ValueError if an argument is out of range, and DatasetError if files are missing or damaged.
    """
    check_shape(shape)
    root = Path(path).expanduser()
    train = _Folder(root / "train", shape)
    return Partitioned(train, _Folder(root / "test", shape, train.classes), partition, clients, mean, std, seed)
