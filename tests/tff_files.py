"""Writes small files in the layouts of TensorFlow Federated's datasets. All content follows from the client's id."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np

Arrays = Mapping[str, np.ndarray]


def write_clients(path: Path, clients: Mapping[str, Arrays]) -> None:
    """Writes `examples/<client id>/<name>` for each client, in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", track_order=True) as file:
        examples = file.create_group("examples", track_order=True)
        for client_id, arrays in clients.items():
            group = examples.create_group(client_id)
            for name, array in arrays.items():
                group[name] = array


def strings(texts: Iterable[str | bytes]) -> np.ndarray:
    """Returns texts as an array of strings of any length, as the real files hold them."""
    texts = [text.encode() if isinstance(text, str) else text for text in texts]
    return np.array(texts, dtype=h5py.string_dtype("ascii"))


def random_for(client_id: str) -> np.random.Generator:
    return np.random.default_rng([*client_id.encode()])


def shakespeare_files(folder: Path, clients: int = 4, speeches: int = 3) -> None:
    """Writes the files of dataset=tff_shakespeare: speeches of 20 to 200 letters, blanks and line breaks."""
    for part in ("train", "test"):
        write_clients(
            folder / f"shakespeare_{part}.h5",
            {
                f"THE_PLAY_ROLE_{i}": {
                    "snippets": strings(
                        bytes(random.choice([*b"aehilnorst ,\n"], random.integers(20, 200)).tolist())
                        for random in [random_for(f"{part}{i}")]
                        for _ in range(speeches)
                    )
                }
                for i in range(clients)
            },
        )


def stackoverflow_files(folder: Path, clients: int = 4, sentences: int = 5, words: int = 10_000) -> None:
    """Writes the files of dataset=stackoverflow: sentences of 1 to 30 words, w1 to w40."""
    for part in ("train", "held_out", "test"):
        users = {}
        for i in range(clients):
            random = random_for(f"{part}{i}")
            count = random.integers(1, sentences + 1)
            texts = [" ".join(f"w{w}" for w in random.integers(1, 41, random.integers(1, 31))) for _ in range(count)]
            users[f"{i:08d}"] = {
                "tokens": strings(texts),
                "title": strings(["w1 w2"] * count),
                "tags": strings(["python|list"] * count),
                "score": np.arange(count, dtype=np.int64),
                "creation_date": strings(["2010-01-08 09:34:05 UTC"] * count),
                "type": strings(["question"] * count),
            }
        write_clients(folder / f"stackoverflow_{part}.h5", users)
    folder.joinpath("stackoverflow.word_count").write_text("".join(f"w{i} {10**6 - i}\n" for i in range(1, words + 1)))


def cifar100_files(folder: Path, clients: int = 4, images: int = 6) -> None:
    """Writes the files of dataset=fed_cifar100: noise with random labels."""
    for part in ("train", "test"):
        users = {}
        for i in range(clients):
            random = random_for(f"{part}{i}")
            users[str(i)] = {
                "image": random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8),
                "label": random.integers(0, 100, images),
                "coarse_label": random.integers(0, 20, images),
            }
        write_clients(folder / f"fed_cifar100_{part}.h5", users)


def many_clients(path: Path, like: str, clients: int) -> None:
    """Adds names to the clients of a file, up to `clients` in all. Each new name is a link to the client `like`."""
    with h5py.File(path, "a") as file:
        examples = file["examples"]
        target = examples[like].id
        for i in range(clients - len(examples)):
            examples.id.links.create_hard(b"%08d" % (10**7 + i), target, b".")
