"""metrics.jsonl: one JSON object a round."""

import json
import os
from contextlib import suppress
from pathlib import Path

Metrics = dict[str, float]


class MetricsFile:
    """Appends the metrics of each round as one whole line of metrics.jsonl.

    Raises FileExistsError where the folder has one already: two runs must not share a folder. Raises OSError where a
    line cannot be written; all lines before it stay, and no part of it does.
    """

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "metrics.jsonl")
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._length = 0

    def write(self, metrics: Metrics) -> None:
        """Appends one line."""
        line = (json.dumps(metrics) + "\n").encode()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            with suppress(OSError):  # a device such as /dev/full cannot be cut back
                os.ftruncate(self._file, self._length)
            raise OSError(error.errno, error.strerror, self._path) from error
        self._length += len(line)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
