"""Where datasets lie on disk and how they come there: fetched once, checked, and put in place whole."""

import fcntl
import hashlib
import os
import posixpath
import shutil
import tarfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich import progress
from rich.console import Console

from fedq.errors import FedqError
from fedq.files import written_whole

CONSOLE = Console(stderr=True)  # stdout is for results


class DatasetError(FedqError):
    """A dataset cannot be had or is damaged; the message is one sentence that says what and where."""


def cache_folder() -> Path:
    """Returns the folder for what is kept: $FEDQ_CACHE, else $XDG_CACHE_HOME/fedq, else ~/.cache/fedq."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("FEDQ_CACHE") or xdg / "fedq").expanduser().absolute()


def obtain(url: str, sha256: str, names: tuple[str, ...]) -> Path:
    """Returns the cache folder, in which the files `names` of the .tar.bz2 archive at `url` now lie.

    Nothing is fetched if they are there, or the archive is (put there by hand); it is removed once unpacked.
    Raises DatasetError if the archive cannot be fetched, is not the one expected, or lacks a file.
    """
    folder = cache_folder()
    archive = folder / url.rpartition("/")[2]
    if all((folder / name).exists() for name in names):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{archive.name}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here; a killed one lets go
            if not all((folder / name).exists() for name in names):
                fetch(url, sha256, archive)
                extract(archive, names)
                archive.unlink()
    except (OSError, HTTPException) as error:
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise DatasetError(
            f"{url} could not be fetched ({reason}): try again, or put {archive.name} into {folder} by hand, "
            f"or set dataset.path= to a folder that holds {' and '.join(names)}, or choose dataset=mnist5k, "
            "which needs no network."
        ) from error
    return folder


def fetch(url: str, sha256: str, destination: Path) -> None:
    """Downloads `url` to `destination`, which appears only once its SHA-256 (hex) is the one expected.

    What came before a failure stays in a .part file beside it, where the next call resumes.
    Raises DatasetError on another hash, OSError or http.client.HTTPException if the transfer fails.
    """
    if destination.exists():
        if (found := _sha256(destination)) != sha256:
            raise DatasetError(f"{destination} has SHA-256 {found}, not {sha256}: delete or replace it.")
        return
    part = destination.with_name(f"{destination.name}.part")
    resumed = True
    while resumed:  # a resumed part may have begun with another file: then once more, from zero
        resumed = _download(url, part)
        if (found := _sha256(part)) == sha256:
            os.replace(part, destination)
            return
        part.unlink()
    raise DatasetError(f"{url} has SHA-256 {found}, not {sha256}: what was fetched is deleted.")


def _download(url: str, part: Path) -> bool:
    """Adds to `part` what it lacks of `url`; returns whether it began with bytes fetched earlier."""
    start = part.stat().st_size if part.exists() else 0
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=30)
    except HTTPError as error:
        error.close()
        if start and error.code == 416:  # nothing lies beyond `start`: complete or too long, the hash decides
            return True
        raise
    with response:
        if response.status != 206:  # the server ignores Range and sends all of it
            start = 0
        columns = (*progress.Progress.get_default_columns(), progress.DownloadColumn())
        with progress.Progress(*columns, console=CONSOLE) as bar, open(part, "ab" if start else "wb") as file:
            total = None if response.length is None else start + response.length
            task = bar.add_task(f"fetching {url.rpartition('/')[2]}", total=total, completed=start)
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.advance(task, len(chunk))
        if response.length:  # a broken connection reads like the end
            raise ConnectionError(f"the connection broke {response.length} bytes before the end")
    return start > 0


def extract(archive: Path, names: tuple[str, ...]) -> None:
    """Writes the files `names` of a .tar.bz2 archive beside it; raises DatasetError if one is missing.

    Only bytes of regular members are read, and written under the names given, so that no path or link
    in the archive matters.
    """
    missing = set(names)
    with (
        progress.open(archive, "rb", description=f"unpacking {archive.name}", console=CONSOLE) as packed,
        tarfile.open(fileobj=packed, mode="r|bz2") as members,  # a stream: everything is unpacked only once
    ):
        for member in members:
            name = posixpath.normpath(member.name)
            if name in names and member.isreg() and (source := members.extractfile(member)):
                with written_whole(archive.with_name(name)) as file:
                    shutil.copyfileobj(source, file)
                missing.discard(name)
    if missing:
        raise DatasetError(f"{archive} lacks {' and '.join(sorted(missing))}.")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
