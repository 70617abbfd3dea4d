"""Downloads against a real HTTP server on this machine, which can break, ignore or refuse ranges."""

import hashlib
import io
import random
import re
import shutil
import socket
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fedq.data.download import DatasetError, cache_folder, extract, fetch, obtain
from fedq.files import written_whole

CONTENT = random.Random(0).randbytes(700_000)
NAMES = ("some_train.h5", "some_test.h5")
MEMBERS = {NAMES[0]: CONTENT, NAMES[1]: CONTENT[:1000]}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def packed(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:bz2") as archive:
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `content` at every path; `ranges` lists the Range header of each request, None without one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.break_after: int | None = None  # the connection closes after this many bytes of a body
        self.knows_ranges = True
        self.says_length = True
        self.status: int | None = None
        self.ranges: list[str | None] = []
        self.bytes_sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/some.tar.bz2"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.knows_ranges else 0
        if server.status or start >= len(server.content):
            self.send_error(server.status or 416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            size = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: server.break_after]
        server.bytes_sent += len(body)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_cache_folder_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("FEDQ_CACHE", "here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("FEDQ_CACHE", "")
    assert cache_folder() == Path("/xdg/fedq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/fedq")


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), written_whole(path) as file:
        file.write(b"sec")
        file.flush()
        raise ZeroDivisionError
    assert path.read_bytes() == b"first"
    assert files(tmp_path) == {"file"}


def test_fetch(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(server.url, sha256(CONTENT), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert files(tmp_path) == {"file"}
    out, err = capsys.readouterr()
    assert out == ""
    assert "some.tar.bz2" in err and "700.0/700.0 kB" in err  # the last state of the progress bar


def test_fetch_without_a_length(server: Server, tmp_path: Path) -> None:
    server.says_length = False
    fetch(server.url, sha256(CONTENT), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_broken_transfer_resumes_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.break_after = 300_000
    with pytest.raises(OSError, match="400000 bytes before the end"):
        fetch(server.url, sha256(CONTENT), tmp_path / "file")
    assert files(tmp_path) == {"file.part"}
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:300_000]
    with pytest.raises(OSError, match="100000 bytes before the end"):
        fetch(server.url, sha256(CONTENT), tmp_path / "file")
    server.break_after = None
    fetch(server.url, sha256(CONTENT), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert files(tmp_path) == {"file"}
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]
    assert server.bytes_sent == len(CONTENT)


def test_a_server_that_ignores_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.knows_ranges = False
    (tmp_path / "file.part").write_bytes(CONTENT[:300_000])
    fetch(server.url, sha256(CONTENT), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == ["bytes=300000-"]


def test_a_complete_part_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)  # the process was killed just before the rename
    fetch(server.url, sha256(CONTENT), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.bytes_sent == 0


@pytest.mark.parametrize("part", [CONTENT + b"more", b"of another file"], ids=["too long", "other"])
def test_a_part_that_does_not_fit_is_dropped(server: Server, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "file.part").write_bytes(part)
    fetch(server.url, sha256(CONTENT), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(part)}-", None]


def test_another_hash_is_refused_and_deleted(server: Server, tmp_path: Path) -> None:
    hashes = f"{sha256(CONTENT)}, not {sha256(b'')}"
    with pytest.raises(DatasetError, match=f"{hashes}: the download is deleted"):
        fetch(server.url, sha256(b""), tmp_path / "file")
    assert files(tmp_path) == set()
    assert server.ranges == [None]


def test_obtain_fetches_and_unpacks_once(server: Server, cache: Path) -> None:
    server.content = packed(MEMBERS)
    for _ in range(2):
        assert obtain(server.url, sha256(server.content), NAMES) == cache
        assert {name: (cache / name).read_bytes() for name in NAMES} == MEMBERS
        assert files(cache) == set(NAMES)
        assert len(server.ranges) == 1


def test_obtain_asks_for_nothing_that_is_there(server: Server, cache: Path) -> None:
    cache.mkdir()
    for name in NAMES:
        (cache / name).write_bytes(b"by hand")
    obtain(server.url, sha256(b""), NAMES)
    assert server.ranges == []
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == dict.fromkeys(NAMES, b"by hand")


def test_obtain_takes_an_archive_put_there_by_hand(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "some.tar.bz2").write_bytes(packed(MEMBERS))
    obtain(server.url, sha256(packed(MEMBERS)), NAMES)
    assert files(cache) == set(NAMES)
    assert server.ranges == []


def test_obtain_refuses_a_wrong_archive_put_there_by_hand(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "some.tar.bz2").write_bytes(b"not it")
    with pytest.raises(DatasetError, match="some.tar.bz2 has SHA-256 .* delete or replace it"):
        obtain(server.url, sha256(packed(MEMBERS)), NAMES)
    assert files(cache) == {"some.tar.bz2"}
    assert server.ranges == []


def assert_says_what_to_do(error: DatasetError, url: str, cache: Path) -> None:
    message = str(error)
    assert "\n" not in message and re.findall(r"\.(?= |$)", message) == ["."] and message.endswith(".")
    for part in (url, str(cache), "some.tar.bz2", "dataset.path=", *NAMES, "dataset=mnist5k"):
        assert part in message


def test_without_network_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/some.tar.bz2"
    with pytest.raises(DatasetError, match=r"\(\[Errno \d+\] Connection refused\)") as caught:
        obtain(url, sha256(b""), NAMES)
    assert_says_what_to_do(caught.value, url, cache)
    assert files(cache) == set()


def test_an_error_of_the_server_is_reported(server: Server, cache: Path) -> None:
    server.status = 403
    with pytest.raises(DatasetError, match="403") as caught:
        obtain(server.url, sha256(b""), NAMES)
    assert_says_what_to_do(caught.value, server.url, cache)
    server.status = 416  # without a .part file, 416 is an error like any other
    with pytest.raises(DatasetError, match="416"):
        obtain(server.url, sha256(b""), NAMES)


def test_no_final_file_after_a_broken_transfer(server: Server, cache: Path) -> None:
    server.content, server.break_after = packed(MEMBERS), 1000
    with pytest.raises(DatasetError, match="connection broke") as caught:
        obtain(server.url, sha256(server.content), NAMES)
    assert_says_what_to_do(caught.value, server.url, cache)
    assert files(cache) == {"some.tar.bz2.part"}


def test_a_cache_that_cannot_be_made_is_reported(server: Server, cache: Path) -> None:
    cache.write_bytes(b"a file where the folder should be")
    with pytest.raises(DatasetError, match="File exists") as caught:
        obtain(server.url, sha256(CONTENT), NAMES)
    assert_says_what_to_do(caught.value, server.url, cache)


def test_no_final_file_after_a_failure_to_unpack(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: io.BufferedReader, file: io.BufferedWriter) -> None:
        file.write(source.read(500))
        raise OSError(28, "No space left on device")

    server.content = packed(MEMBERS)
    cache.mkdir()
    fetch(server.url, sha256(server.content), cache / "some.tar.bz2")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(DatasetError, match="No space left on device"):
            obtain(server.url, sha256(server.content), NAMES)
    assert files(cache) == {"some.tar.bz2"}  # the archive is right, so it is not fetched again
    obtain(server.url, sha256(server.content), NAMES)
    assert files(cache) == set(NAMES)
    assert len(server.ranges) == 1


def test_two_at_once_fetch_once(server: Server, cache: Path) -> None:
    server.content = packed(MEMBERS)
    with ThreadPoolExecutor(4) as pool:  # flock() locks open files, of threads and of processes
        jobs = [pool.submit(obtain, server.url, sha256(server.content), NAMES) for _ in range(4)]
    assert [job.result() for job in jobs] == [cache] * 4
    assert {name: (cache / name).read_bytes() for name in NAMES} == MEMBERS
    assert server.ranges == [None]


def test_unpacking_writes_the_named_files_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    strangers = {f"../{NAMES[0]}": b"evil", f"{tmp_path}/absolute": b"evil", "other": b"evil"}
    archive = folder / "archive"
    archive.write_bytes(packed({f"./{NAMES[0]}": b"train", NAMES[1]: b"test", **strangers}, {"link": "/etc"}))
    extract(archive, NAMES)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path != archive} == {
        NAMES[0]: b"train",
        NAMES[1]: b"test",
    }
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_a_link_is_not_a_file(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(packed({NAMES[1]: b"test", "secret": b"secret"}, {NAMES[0]: "secret"}))
    with pytest.raises(DatasetError, match=f"archive lacks {NAMES[0]}."):
        extract(archive, NAMES)
    assert files(tmp_path) == {"archive", NAMES[1]}
