"""The cache folder, and downloads into it: each archive is fetched once, checked and unpacked."""

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

CONSOLE = Console(stderr=True)  # stderr, because stdout is for results


class DatasetError(FedqError):
    """A dataset is missing or damaged; the message is one sentence that names the file and the fault."""


def cache_folder() -> Path:
    """Returns the cache folder: $FEDQ_CACHE, else $XDG_CACHE_HOME/fedq, else ~/.cache/fedq."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("FEDQ_CACHE") or xdg / "fedq").expanduser().absolute()


def obtain(url: str, sha256: str, names: tuple[str, ...]) -> Path:
    """Returns the cache folder, after fetching and unpacking the archive at `url` if files are missing.

    An archive that a user put into the cache folder is unpacked without a download. The archive is deleted
    once it is unpacked. Processes that start at the same time fetch it once.

    Args:
        url: address of a .tar.bz2 archive.
        sha256: the archive's SHA-256, in hexadecimal.
        names: the files of the archive that the dataset needs.

    Raises DatasetError if the download fails, the archive has another hash, or a file is not in the archive.
    """
    folder = cache_folder()
    archive = folder / url.rpartition("/")[2]
    if all((folder / name).exists() for name in names):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{archive.name}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait here; the lock of a killed process is free
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
    """Downloads `url` to the file `destination`, which appears only if its SHA-256 (hexadecimal) is `sha256`.

    After a broken transfer the bytes stay in a .part file next to `destination`. The next call resumes from this file.
    Raises DatasetError if the hash differs, and OSError or http.client.HTTPException if the transfer fails.
    """
    if destination.exists():
        if (found := _sha256(destination)) != sha256:
            raise DatasetError(f"{destination} has SHA-256 {found}, not {sha256}: delete or replace it.")
        return
    part = destination.with_name(f"{destination.name}.part")
    while True:
        start = part.stat().st_size if part.exists() else 0
        _append(url, part, start)
        if (found := _sha256(part)) == sha256:
            os.replace(part, destination)
            return
        part.unlink()
        if not start:  # the .part file may be of another archive: fetch again from byte 0
            raise DatasetError(f"{url} has SHA-256 {found}, not {sha256}: the download is deleted.")


def _append(url: str, part: Path, start: int) -> None:
    """Downloads `url` from byte `start` to the end of `part`."""
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=30)
    except HTTPError as error:
        error.close()
        if start and error.code == 416:  # the archive ends at or before `start`; its hash decides
            return
        raise
    mode = "ab" if response.status == 206 else "wb"  # a server that ignores Range sends the whole archive
    label = f"fetching {url.rpartition('/')[2]}"
    with (
        response,
        progress.wrap_file(response, response.length or 0, description=label, console=CONSOLE) as body,
        open(part, mode) as file,
    ):
        shutil.copyfileobj(body, file)
        if response.length:  # read() returns b"" both at the end and when the connection breaks
            raise ConnectionError(f"the connection broke {response.length} bytes before the end")


def extract(archive: Path, names: tuple[str, ...]) -> None:
    """Unpacks the files `names` of a .tar.bz2 archive into its folder. Raises DatasetError if a file is missing.

    Only regular members are read, and files are written only under `names`: paths and links in the archive are ignored.
    """
    missing = set(names)
    with (
        progress.open(archive, "rb", description=f"unpacking {archive.name}", console=CONSOLE) as packed,
        tarfile.open(fileobj=packed, mode="r|bz2") as members,  # a stream unpacks each byte once
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
