"""Parquet files with a column of clients: images as Hugging Face stores them, text, and numbers."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedq.data.characters import VOCABULARY, sequences, tokens
from fedq.data.download import DatasetError
from fedq.data.parquet import Parquet

WRITERS = ["w3", "w1", "w3", "w2", "w1", "w3"]


def write(path: Path, columns: dict, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def image(i: int) -> tuple[np.ndarray, bytes]:
    """Returns pixels (5, 4, 3) and the bytes of a PNG file."""
    pixels = np.random.default_rng(i).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def numbers(folder: Path, x: object, y: object = None, **options) -> Parquet:
    """Writes a train file of six rows and a test file of the last two; returns the dataset with columns x and y."""
    table = pa.table({"writer": WRITERS, "x": x, "y": [0, 1, 2, 0, 1, 2] if y is None else y})
    write(folder / "train.parquet", dict(zip(table.column_names, table.columns, strict=True)))
    pq.write_table(table.slice(4), folder / "test.parquet")
    return Parquet(str(folder), "writer", "x", "y", **options)


def test_images_of_a_hugging_face_snapshot(tmp_path):
    pictures = [{"bytes": image(i)[1], "path": f"{i}.png"} for i in range(6)]
    for name, rows in (("train-00000-of-00002", slice(0, 4)), ("train-00001-of-00002", slice(4, 6))):
        columns = {"writer": WRITERS[rows], "image": pictures[rows], "label": [5, 1, 2, 0, 1, 3][rows]}
        write(tmp_path / "data" / f"{name}-0123456789abcdef.parquet", columns)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", {"image": pictures[:2], "label": [7, 0]})
    dataset = Parquet(str(tmp_path), "writer", "image", "label", shape=[3, 5, 4])
    assert (dataset.num_clients, dataset.num_classes, dataset.client_ids) == (3, 8, ["w1", "w2", "w3"])
    assert [dataset.client(number).examples for number in range(3)] == [2, 1, 3]
    x, y = dataset.client(2).load()
    assert y.tolist() == [5, 2, 3] and y.dtype == torch.int64
    expected = np.stack([image(i)[0] for i in (0, 2, 5)])
    assert torch.equal(x, torch.from_numpy(expected).permute(0, 3, 1, 2) / 255)
    assert dataset.client(2).test is None  # the test file has no writers
    assert dataset.test().y.tolist() == [7, 0]
    grey = Parquet(str(tmp_path), "writer", "image", "label", shape=[1, 10, 8], mean=[0.5], std=[0.5])
    assert grey.test().x.shape == (2, 1, 10, 8) and grey.test().x.min() < 0
    with pytest.raises(ValueError, match="shape must be"):
        Parquet(str(tmp_path), "writer", "image", "label")


def test_numbers_in_lists_become_the_shape(tmp_path):
    x = torch.rand(6, 2, 3)
    for i, kind in enumerate((pa.list_(pa.list_(pa.float32())), pa.list_(pa.list_(pa.float64(), 3), 2))):
        dataset = numbers(tmp_path / str(i), pa.array(x.tolist(), kind))
        assert torch.equal(dataset.client(2).load().x, x[[0, 2, 5]])
    assert numbers(tmp_path / "2", pa.array(x.tolist()), shape=[3, 2, 1]).client(0).load().x.shape == (2, 3, 2, 1)
    assert dataset.client(0).test().y.tolist() == [1] and dataset.client(1).test is None
    bytes_ = numbers(tmp_path / "3", pa.array([[i, 255] for i in range(6)], pa.list_(pa.uint8())))
    assert torch.equal(bytes_.client(1).load().x, torch.tensor([[3 / 255, 1.0]]))
    ids = numbers(tmp_path / "4", [[i, 7] for i in range(6)]).client(1).load().x
    assert ids.dtype == torch.int64 and ids.tolist() == [[3, 7]]


def test_columns_of_numbers_and_targets_of_regression(tmp_path):
    ages, heights = list(range(6)), [1.5, 1.6, 1.7, 1.8, 1.9, 2.0]
    columns = {"age": ages, "height": heights, "pay": [0.5] * 6, "tags": [[0, 1, 1]] * 6, "who": [3, 1, 3, 10, 1, 3]}
    write(tmp_path / "train" / "0000.parquet", columns)
    write(tmp_path / "test" / "0000.parquet", columns)
    dataset = Parquet(str(tmp_path), "who", ["age", "height"], "pay")
    assert (dataset.client_ids, dataset.num_classes) == ([1, 3, 10], 1)
    x, y = dataset.client(1).load()
    assert torch.equal(x, torch.tensor([[0, 1.5], [2, 1.7], [5, 2.0]])) and y.tolist() == [[0.5]] * 3
    assert Parquet(str(tmp_path), "who", "age", "tags").num_classes == 3
    assert Parquet(str(tmp_path), "who", "age", "tags").client(2).load().y.tolist() == [[0, 1, 1]]


def test_text_becomes_tokens(tmp_path):
    texts = [f"{i} quick brown foxes jump over {i} lazy dogs. " * (i + 1) for i in range(6)]
    dataset = numbers(tmp_path, texts)
    x, y = dataset.client(2).load()
    assert x.shape == (3, 80) and y.tolist() == [0, 2, 2]
    assert x[0].tolist() == [*tokens(texts[0].encode()), *[0] * (80 - len(texts[0]))]
    assert x[2].tolist() == tokens(texts[5][:80].encode()).tolist()
    following = Parquet(str(tmp_path), "writer", "x")
    assert following.num_classes == VOCABULARY
    x, y = following.client(0).load()
    parts = [sequences(tokens(texts[i].encode())) for i in (1, 4)]
    assert torch.equal(x, torch.cat([part.x for part in parts])) and torch.equal(y, torch.cat([p.y for p in parts]))


def test_a_load_reads_only_the_clients_row_groups(tmp_path):
    writers = pa.array(np.repeat([f"w{i:03}" for i in range(100)], 10))
    columns = {"writer": writers, "x": np.arange(1000.0), "y": [0] * 1000}
    write(tmp_path / "train.parquet", columns, row_group_size=10)
    write(tmp_path / "test.parquet", columns, row_group_size=10)
    dataset = Parquet(str(tmp_path), "writer", "x", "y")
    data = bytearray((tmp_path / "train.parquet").read_bytes())
    groups = pq.read_metadata(tmp_path / "train.parquet")
    for i in [*range(7), *range(8, 100)]:  # all values of x of the other clients are damaged
        chunk = groups.row_group(i).column(1)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    (tmp_path / "train.parquet").write_bytes(data)
    with ThreadPoolExecutor(4) as threads:
        for x, _ in threads.map(lambda _: dataset.client(7).load(), range(20)):
            assert x.tolist() == list(range(70, 80))
    with pytest.raises(DatasetError, match=r"the files cannot be read \(.+\)\.$"):
        dataset.client(8).load()


def test_categories_are_clients(tmp_path):
    columns = {"writer": pa.array(WRITERS).dictionary_encode(), "x": np.arange(6.0), "y": [0] * 6}
    write(tmp_path / "train.parquet", columns)
    write(tmp_path / "test.parquet", columns)
    dataset = Parquet(str(tmp_path), "writer", "x", "y")
    assert dataset.client_ids == ["w1", "w2", "w3"]
    assert dataset.client(2).load().x.tolist() == dataset.client(2).test().x.tolist() == [0, 2, 5]


def test_empty_and_missing_texts_have_no_tokens(tmp_path):
    dataset = numbers(tmp_path, ["", "a", None, "ab", "", ""])
    assert not dataset.client(2).load().x.any()
    following = Parquet(str(tmp_path), "writer", "x")
    assert [len(following.client(number).load().y) for number in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("x", "y", "error"),
    [
        ([[1.0], [2.0, 3.0]] * 3, None, "column 'x' has lists of 2 lengths; all lists must have one length"),
        ([1.0, None] * 3, None, "column 'x' has missing values"),
        ([[1.0], None] * 3, None, "column 'x' has missing values"),
        ([[1.0], [None]] * 3, None, "column 'x' has missing values"),
        (
            [1.0] * 6,
            [0, -1] * 3,
            "column 'y' has labels from -1 to 0, and 0 missing labels. All rows must have labels from 0 to 2147483647",
        ),
        ([1.0] * 6, [0, None] * 3, "column 'y' has labels from 0 to 0, and 4 missing"),
        ([1.0] * 6, ["a"] * 6, "column 'y' holds string; the column must hold numbers"),
        ([b"no image"] * 6, None, "column 'x' is not a readable image"),
        ([{"bytes": None, "path": "a.png"}] * 6, None, "column 'x' is not a readable image"),
        ([{"path": "a.png"}] * 6, None, "the inputs are struct<path: string>, without the bytes of an image"),
        ([{"bytes": "a"}] * 6, None, "the inputs are struct<bytes: string>, without the bytes of an image"),
        (pa.array([[("a", 1)]] * 6, pa.map_(pa.string(), pa.int8())), None, "the column must hold numbers"),
        ([1.0] * 6, [2**31] * 6, "column 'y' has labels from 2147483648 to 2147483648"),
    ],
)
def test_values_that_do_not_fit_are_one_sentence(tmp_path, x, y, error):
    with pytest.raises((DatasetError, ValueError), match=re.escape(error)) as caught:
        numbers(tmp_path, x, y, shape=[1, 1, 1]).client(2).load()
    assert "\n" not in str(caught.value)


def test_other_faults_are_one_sentence(tmp_path):
    with pytest.raises(DatasetError, match="must hold .parquet files whose name, or folder, begins with 'train'"):
        Parquet(str(tmp_path), "writer", "x", "y")
    dataset = numbers(tmp_path, [[1.0, 2.0]] * 6)
    with pytest.raises(IndexError, match="there is no client 3: the numbers are 0 to 2"):
        dataset.client(3)
    for names in (("who", "x", "y"), ("writer", "who", "y"), ("writer", "x", "who")):
        with pytest.raises(ValueError, match="has no column 'who', only writer, x, y"):
            Parquet(str(tmp_path), *names)
    with pytest.raises(ValueError, match="y must be a column: 'x' is not text"):
        Parquet(str(tmp_path), "writer", "x")
    with pytest.raises(DatasetError, match=re.escape("column 'x' has inputs of shape [2], not [3]")):
        numbers(tmp_path, [[1.0, 2.0]] * 6, shape=[3]).test()
    with pytest.raises(DatasetError, match="must have labels from 0 to 1"):
        Parquet(str(tmp_path), "writer", "x", "y", classes=2)
    assert Parquet(str(tmp_path), "writer", "x", "y", classes=9).num_classes == 9
    write(tmp_path / "train.parquet", {"writer": ["a", None], "x": [1.0, 2.0], "y": [0, 1]})
    with pytest.raises(DatasetError, match="1 rows have no 'writer'"):
        Parquet(str(tmp_path), "writer", "x", "y")
    for writers, error in (
        ([1.0, float("nan")], "1 rows have no 'writer'"),
        ([[1], [2]], r"'writer' holds list<element: int64>; it must hold one value a row"),
        ([1, 2], "'writer' is int64 in 'train', and string in 'test'; both columns must have one type"),
        (pa.array([], pa.string()), "the files of 'train' have no rows"),
    ):
        few = len(writers)
        x, y = pa.array([1.0, 2.0][:few], pa.float32()), pa.array([0, 1][:few], pa.int64())
        write(tmp_path / "train.parquet", {"writer": writers, "x": x, "y": y})
        with pytest.raises(DatasetError, match=error):
            Parquet(str(tmp_path), "writer", "x", "y")
    numbers(tmp_path, [1.0] * 6)
    with pytest.raises(ValueError, match="x must name a column, or several"):
        Parquet(str(tmp_path), "writer", [], "y")
    with pytest.raises(ValueError, match="mean and std must be null: 'x' holds no images"):
        Parquet(str(tmp_path), "writer", "x", "y", std=[0.5])
    with pytest.raises(ValueError, match="classes must be at least 1, not 0"):
        Parquet(str(tmp_path), "writer", "x", "y", classes=0)
    assert Parquet(str(tmp_path), "writer", "y", "y").client(0).load().x.tolist() == [1, 1]
    (tmp_path / "train.parquet").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match="the files of 'train' cannot be read"):
        Parquet(str(tmp_path), "writer", "x", "y")


def test_without_pyarrow_the_extra_is_named():
    program = "import sys; sys.modules['pyarrow'] = None; import fedq.data.parquet"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    sentence = 'dataset=parquet needs pyarrow: pip install "fedq[parquet]"'
    assert f"MissingPackage: {sentence}" in done.stderr
    settings = ["parquet", "dataset.path=.", "dataset.client=who", "dataset.x=x"]
    program = f"import sys; sys.modules['pyarrow'] = None; from fedq.data.__main__ import main; main({settings})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.endswith(f"cannot be imported: {sentence}\n")
