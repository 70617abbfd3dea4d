"""Files that are complete or absent, and a log file that never ends a run."""

import errno
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from typing_extensions import override

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Error numbers of a full or broken disk. Such an OSError does not name the file."""


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` after the complete file is on the disk.

    Until then the file has a unique name that ends in .tmp. On an error the file is
    deleted. Raises OSError with the path if the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave a short file under the final name
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of `written_whole` that killed processes left in `folder`."""
    for path in folder.glob(f"*.{'[0-9a-f]' * 32}.tmp"):
        path.unlink(missing_ok=True)


class LogFile(logging.FileHandler):
    """A log file in UTF-8, whatever the locale. On a full disk, lines of the log are lost, and the run continues."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8")

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        pass
