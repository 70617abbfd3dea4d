"""metrics.jsonl: one JSON object a round."""

import fcntl
import json
import math
import os
from contextlib import suppress
from pathlib import Path

from fedq.errors import FedqError

Metrics = dict[str, float]


class MetricsFile:
    """Appends the metrics of each round to metrics.jsonl, as one line each.

    Raises BlockingIOError if another process writes the file: two runs must not share a folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "metrics.jsonl")
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock ends with the process
        except BlockingIOError:
            os.close(self._file)
            raise
        self._length = os.fstat(self._file).st_size

    @property
    def empty(self) -> bool:
        """Whether the file has no line, of this run or of an earlier run in the folder."""
        return self._length == 0

    def restore(self, source: Path, rounds: int) -> list[Metrics]:
        """Makes the file hold the first `rounds` lines of `source`, and returns the metrics in these lines.

        source: this file, or the metrics.jsonl of an earlier run.

        Raises FedqError if `source` has fewer lines, or lines that are no metrics.
        """
        lines = source.read_bytes().splitlines(keepends=True)[:rounds] if source.exists() else []
        if len(lines) < rounds:
            raise FedqError(f"{source} has {len(lines)} rounds, the checkpoint {rounds}; start afresh in a new folder")
        known = []
        for number, line in enumerate(lines, 1):
            try:
                known.append({name: math.nan if value is None else value for name, value in json.loads(line).items()})
            except (ValueError, AttributeError) as error:
                raise FedqError(f"{source} is damaged in line {number}; start afresh in a new folder") from error
        self._length = sum(map(len, lines))
        if not source.samefile(self._path):
            os.ftruncate(self._file, 0)
            os.write(self._file, b"".join(lines))
        os.ftruncate(self._file, self._length)
        return known

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        os.fsync(self._file)

    def write(self, metrics: Metrics) -> None:
        """Appends one line. NaN and infinity are written as null.

        Raises OSError with the path if the disk is full. The file then holds no part of the line.
        """
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = (json.dumps(known) + "\n").encode()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            with suppress(OSError):  # a device such as /dev/full cannot be truncated
                os.ftruncate(self._file, self._length)
            raise OSError(error.errno, error.strerror, self._path) from error
        self._length += len(line)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
