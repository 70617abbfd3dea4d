"""Parquet files with a column of clients, such as a Hugging Face dataset on disk. The file needs pyarrow."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedq.data.characters import LENGTH, VOCABULARY, sequences, tokens
from fedq.data.dataset import Client, Examples, pooled
from fedq.data.download import DatasetError
from fedq.data.images import check_shape, decoded
from fedq.data.partitioned import normalised, stacked
from fedq.data.tokens import Tokenizer
from fedq.errors import MissingPackage, check_range

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
except ImportError as error:
    raise MissingPackage('dataset=parquet needs pyarrow: pip install "fedq[parquet]"') from error


class Parquet:
    """A client for each value of a column. Each load reads only the row groups that may hold the client.

    Files sorted by client, with small row groups and a plain column of clients, load fastest. Clients are numbered in
    the sorted order of their values (`client_ids`). If the test files also have the column of clients, each client in
    that column has test examples.

    The column x has image files (bytes, or a struct with `bytes`, as Hugging Face stores images), texts or numbers. The
    numbers of a row are one number or a list. uint8 becomes float32 in [0, 1]. Lists of other integers become int64,
    and other numbers become float32. Text becomes tokens. With y, x is the first `length` tokens, padded. Without y, x
    is cut into sequences of `length`, and y is the next tokens.

    path: folder of the .parquet files. A file belongs to a part if its name, or its folder's name, begins with the
        part's name.
    client: column that names the client of a row.
    x: column of the inputs, or columns of numbers.
    y: column of the labels (integers) or targets (other numbers, or lists); null for the next tokens of a text.
    shape: shape of an input. Required for images, which are converted and stretched to [channels, height, width].
    classes: number of labels; null for one more than the highest label. Text and other targets do not need this number.
    mean: mean of each channel, to subtract.
    std: standard deviation of each channel, to divide by.
    train: name of the training part.
    test: name of the test part.
    tokenizer: tokenizer of a pretrained model, see `fedq.data.tokens`. Targets of padding are then −100. null takes the
        tokens of `fedq.data.shakespeare`, where padding is 0.
    length: tokens of a sequence.

    Raises ValueError if a column is missing. Raises DatasetError, here or in a load, if files are missing or damaged.
    """

    def __init__(
        self,
        path: str,
        client: str,
        x: str | list[str],
        y: str | None = None,
        shape: list[int] | None = None,
        classes: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        train: str = "train",
        test: str = "test",
        tokenizer: str | None = None,
        length: int = LENGTH,
    ) -> None:
        check_range("classes", classes, 1, integer=True, optional=True)
        self._client, self._x, self._y = client, [x] if isinstance(x, str) else x, y
        if not self._x:
            raise ValueError("x must name a column, or several.")
        self._shape, self._mean, self._std = shape, mean, std
        folder = Path(path).expanduser()
        self._train, self._test = (_opened(folder, part) for part in (train, test))
        names = [*self._x, *([] if y is None else [y])]
        for part, needed in ((self._train, [client, *names]), (self._test, names)):
            for name in needed:
                if name not in part.schema.names:
                    raise ValueError(f"{folder} has no column {name!r}, only {', '.join(part.schema.names)}.")
        self._kind = _kind(self._train.schema.field(self._x[0]).type)
        if self._kind == "image":
            check_shape(shape or [])
        elif mean is not None or std is not None:
            raise ValueError(f"mean and std must be null: {self._x[0]!r} holds no images.")
        if y is None and self._kind != "text":
            raise ValueError(f"y must be a column: {self._x[0]!r} is not text, whose next tokens could be predicted.")
        self._length, self._tokenizer = length, Tokenizer(tokenizer, length) if tokenizer else None
        vocabulary = self._tokenizer.vocabulary if self._tokenizer else VOCABULARY
        self.num_classes = vocabulary if y is None else self._classes(y, classes)
        self._ids, self._counts = _clients(self._train, client)
        test_ids = _clients(self._test, client)[0] if client in self._test.schema.names else self._ids[:0]
        try:
            self._own_test = pc.is_in(self._ids, test_ids.cast(self._ids.type)).to_pylist()
        except pa.ArrowException as error:
            found = f"{client!r} is {self._ids.type} in {train!r}, and {test_ids.type} in {test!r}"
            raise DatasetError(f"{folder}: {found}; both columns must have one type.") from error
        self.num_clients = len(self._ids)

    @property
    def client_ids(self) -> list[Any]:
        """The values of the column of clients, in the order of the clients' numbers."""
        ids: list[Any] = self._ids.to_pylist()
        return ids

    def client(self, number: int) -> Client:
        """Returns client `number`; raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        rows = ds.field(self._client) == self._ids[number]
        examples = 0 if self._y is None else self._counts[number].as_py()  # a text has any number of sequences
        test = partial(self._read, self._test, rows) if self._own_test[number] else None
        return Client(number, partial(self._read, self._train, rows), examples, test=test)

    def test(self) -> Examples:
        """Returns the examples of the test files, in the order of the files; each call reads them."""
        return self._read(self._test, None)

    def _read(self, part: Any, rows: Any) -> Examples:
        table = _table(part, [*self._x, *([] if self._y is None else [self._y])], rows)
        where = f"{Path(part.files[0]).parent}: column"
        columns = [table[name].combine_chunks() for name in self._x]
        if self._y is None:
            texts = [text or "" for text in columns[0].to_pylist()]
            if self._tokenizer:
                return pooled(map(self._tokenizer.sequences, self._tokenizer.ids(texts)))
            return pooled(sequences(tokens(text.encode()), self._length) for text in texts)
        y = _numbers(table[self._y].combine_chunks(), f"{where} {self._y!r}")
        y = y.reshape(len(y), -1) if y.is_floating_point() else y.long()  # a regression has outputs (N, numbers)
        return Examples(self._inputs(columns, f"{where} {self._x[0]!r}"), y)

    def _inputs(self, columns: list[Any], where: str) -> Tensor:
        if self._kind == "text":
            texts = [text or "" for text in columns[0].to_pylist()]
            if self._tokenizer:
                return self._tokenizer.rows(texts)
            x = torch.zeros(len(texts), self._length, dtype=torch.int64)
            for row, text in zip(x, texts, strict=True):
                ids = torch.from_numpy(tokens(text.encode()[: self._length]).copy())
                row[: len(ids)] = ids
            return x
        if self._kind == "image":
            files = columns[0].field("bytes") if pa.types.is_struct(columns[0].type) else columns[0]
            images = [decoded(file or b"", self._shape or [], where) for file in files.to_pylist()]
            return normalised(stacked(images), self._mean, self._std)
        numbers = [_numbers(column, where) for column in columns]
        x = numbers[0] if len(numbers) == 1 else torch.stack([column.float() for column in numbers], dim=1)
        x = x / 255 if x.dtype == torch.uint8 else x
        try:
            return x if self._shape is None else x.reshape(len(x), *self._shape)
        except (RuntimeError, TypeError) as error:
            raise DatasetError(f"{where} has inputs of shape {list(x.shape[1:])}, not {self._shape}.") from error

    def _classes(self, y: str, classes: int | None) -> int:
        """Returns the number of classes. For targets that are not labels, returns how many numbers a target has."""
        if not pa.types.is_integer(self._train.schema.field(y).type):
            return _numbers(self._train.head(1, columns=[y])[y].combine_chunks(), f"column {y!r}")[0].numel()
        labels = pa.chunked_array(chunk for part in (self._train, self._test) for chunk in _table(part, [y])[y].chunks)
        low, high = pc.min_max(labels).as_py().values()
        if labels.null_count or low < 0 or high >= (classes or 2**31):
            allowed = f"from 0 to {(classes or 2**31) - 1}"
            raise DatasetError(
                f"column {y!r} has labels from {low} to {high}, and {labels.null_count} missing labels. "
                f"All rows must have labels {allowed}."
            )
        return classes or 1 + int(high)


def _opened(folder: Path, part: str) -> Any:
    """Returns the pyarrow dataset of a part's files, without reading rows."""
    files = sorted(
        str(file)
        for file in folder.rglob("*.parquet")
        if any(name.startswith(part) for name in file.relative_to(folder).parts)
    )
    if not files:
        raise DatasetError(f"{folder} must hold .parquet files whose name, or folder, begins with {part!r}.")
    try:
        schema = ds.dataset(files, format="parquet").schema
        # categories are read as their values, because other files may number them differently
        plain = [
            field.with_type(f.value_type) if pa.types.is_dictionary(f := field.type) else field for field in schema
        ]
        opened = ds.dataset(files, pa.schema(plain), format="parquet")
        if not opened.count_rows():
            raise DatasetError(f"{folder}: the files of {part!r} have no rows.")
        return opened
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(f"{folder}: the files of {part!r} cannot be read ({reason}).") from error


def _table(part: Any, columns: list[str], rows: Any = None) -> Any:
    """Returns columns of the rows that an expression selects, or of all rows."""
    try:
        return part.to_table(columns=list(dict.fromkeys(columns)), filter=rows, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(f"{Path(part.files[0]).parent}: the files cannot be read ({reason}).") from error


def _clients(part: Any, client: str) -> tuple[Any, Any]:
    """Returns the sorted values of the column of clients and the number of rows of each."""
    column = _table(part, [client])[client]
    where, kind = Path(part.files[0]).parent, column.type
    if pa.types.is_nested(kind):
        raise DatasetError(f"{where}: {client!r} holds {kind}; it must hold one value a row.")
    if missing := pc.sum(pc.is_null(column, nan_is_null=True)).as_py():
        raise DatasetError(f"{where}: {missing} rows have no {client!r}.")
    counts = pc.value_counts(column)
    values = counts.field("values")
    order = pc.sort_indices(values)
    return values.take(order), counts.field("counts").take(order)


def _kind(column: Any) -> str:
    """Returns the kind of a column of inputs, by the column's type: "text", "image" or "numbers"."""
    if pa.types.is_string(column) or pa.types.is_large_string(column):
        return "text"
    in_struct = pa.types.is_struct(column)
    data = column.field("bytes").type if in_struct and column.get_field_index("bytes") >= 0 else column
    if pa.types.is_binary(data) or pa.types.is_large_binary(data) or (in_struct and pa.types.is_null(data)):
        return "image"
    if in_struct:
        raise ValueError(f"the inputs are {column}, without the bytes of an image.")
    return "numbers"


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _numbers(column: Any, where: str) -> Tensor:
    """Returns a column of numbers or of lists of equal length as a tensor (N, …), lists of any depth.

    uint8 keeps its dtype; other integers become int64, and other numbers float32.
    Raises DatasetError for other types, missing values and lists of several lengths.
    """
    shape = [len(column)]
    while _is_list(column.type) and not column.null_count:
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(lengths) != 1:
            raise DatasetError(f"{where} has lists of {len(lengths)} lengths; all lists must have one length.")
        shape.append(lengths[0])
        column = column.flatten()
    if column.null_count:
        raise DatasetError(f"{where} has missing values.")
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DatasetError(f"{where} holds {kind}; the column must hold numbers.")
    values = column.to_numpy(zero_copy_only=False)
    if not pa.types.is_uint8(kind):
        values = values.astype(np.float32 if pa.types.is_floating(kind) else np.int64)
    return torch.from_numpy(values.copy()).reshape(shape)
