"""Stores the state of clients between their rounds: in memory up to a limit, then in files."""

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedq.encoding import Key, MessageError, StateDictEncoder
from fedq.encoding.schema import Schema, schema_of
from fedq.errors import FedqError
from fedq.files import written_whole

_EXACT = StateDictEncoder()
_NAME = re.compile(r"(\d+)_(\d+)\.residual")
_MARK = "ranks"


class ClientStateError(FedqError):
    """The state of a client cannot be used. The text names the file or folder, and the reason."""


class ClientStateFiles:
    """A `fedq.learning.client_state.ClientStore` in a run's folder.

    A version is a client's state after the round of one attempt. At most `memory` bytes of tensors stay in memory.
    Beyond this limit, the least recently used versions go to files, one file CLIENT_ATTEMPT.residual a version. A file
    is an exact message of the client and the round, with a checksum. Files never change: a repeated round writes the
    same bytes.

    With `shared`, no version stays in memory: all ranks write and read the files of one folder. The disk must show a
    finished file to all ranks at once. A client's next round may run on another rank, and starts after this round has
    ended.
    """

    def __init__(self, folder: Path, seed: int, memory: int = 2**30, shared: bool = False) -> None:
        """`seed` is the run's seed. Call `resume` before all other methods."""
        self.folder = folder.absolute()
        self._seed, self._limit, self._shared = seed, memory, shared
        self._held: OrderedDict[tuple[int, int], Mapping[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._versions: dict[int, dict[int, bool]] = {}  # client → version → is it in a file?
        self._listed = self._newest = -1
        self._lock = threading.Lock()

    @classmethod
    def joined(cls, folder: str, mark: str, seed: int) -> "ClientStateFiles":
        """Returns the store in another rank's folder. That rank's `mark()` returned `mark`.

        Raises ClientStateError if this rank does not see the folder.
        """
        store = cls(Path(folder), seed, shared=True)
        try:
            seen = (store.folder / _MARK).read_text()
        except OSError:
            seen = ""
        if seen != mark:
            raise ClientStateError(
                f"this rank cannot see {folder}: where clients keep state all ranks must share rank 0's folder; "
                "set hydra.run.dir to one on a shared disk"
            )
        return store

    def mark(self) -> str:
        """Writes a random mark into the folder, and returns the mark. Other ranks use it to recognise the folder."""
        mark = secrets.token_hex(8)
        with written_whole(self.folder / _MARK) as file:
            file.write(mark.encode())
        return mark

    def resume(self, attempt: int, source: Path | None = None) -> None:
        """Continues with the versions before round number `attempt` in `source`, the folder of a run.

        Later versions are ignored, and `prune` deletes them. Without `source` the clients start without state.
        """
        if source and not source.is_dir():
            raise ClientStateError(f"{source} is missing: without it the clients' state cannot be resumed")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.tmp"):
            path.unlink(missing_ok=True)
        if source and source.absolute() != self.folder:
            for client, versions in _listed(source).items():
                if (version := _newest(versions, attempt)) is not None:
                    with written_whole(_path(self.folder, client, version)) as file:
                        file.write(_path(source, client, version).read_bytes())
        self._versions = self._in_files(attempt) if source else {}

    def begin(self, attempt: int) -> None:
        """Forgets the versions of rounds from number `attempt` on."""
        with self._lock:
            if attempt <= self._newest:
                for client, versions in self._versions.items():
                    for version in [version for version in versions if version >= attempt]:
                        del versions[version]
                        self._let_go(client, version)
            self._newest = attempt - 1

    def load(self, client: int, attempt: int, schema: Schema) -> Mapping[str, Tensor]:
        """Returns the client's newest version from before round number `attempt`, or an empty dict.

        `schema` is the schema of the committed tensors. Raises ClientStateError, which names the file, if the file is
        damaged.
        """
        if not schema:
            return {}
        with self._lock:
            if self._shared and attempt != self._listed:
                self._versions, self._listed = self._in_files(attempt), attempt
            version = _newest(self._versions.get(client, ()), attempt)
            if version is None:
                return {}
            if (client, version) in self._held:
                self._held.move_to_end((client, version))
                return self._held[client, version]
        path = _path(self.folder, client, version)
        try:
            return _EXACT.bind(schema).decode(path.read_bytes(), Key(self._seed, version, client)).tensors
        except (OSError, MessageError) as error:
            raise ClientStateError(f"client state file {path} cannot be used: {error}") from error

    def commit(self, client: int, attempt: int, tensors: Mapping[str, Tensor]) -> None:
        """Stores the client's state after round number `attempt`: finite tensors on the CPU, never changed later.

        Raises OSError if a file cannot be written. With `shared` it raises ClientStateError, which names the file.
        """
        if self._shared:
            try:
                self._write(client, attempt, tensors)
            except OSError as error:
                path = _path(self.folder, client, attempt)
                raise ClientStateError(f"client state file {path} cannot be written: {error}") from error
            return
        with self._lock:
            self._newest = max(self._newest, attempt)
            versions = self._versions.setdefault(client, {})
            for version, in_file in versions.items():
                if in_file:  # only a resumed run can need this version
                    self._let_go(client, version)
            self._let_go(client, attempt)
            versions[attempt] = False
            self._held[client, attempt] = tensors
            self._bytes += _size(tensors)
            while self._bytes > self._limit:
                least = next(iter(self._held))
                self._to_file(*least)
                self._let_go(*least)

    def settle(self) -> None:
        """Forgets versions that are only in memory, except each client's newest: no later checkpoint can need them.

        Call this method between rounds, after a round is done. A run that stops earlier resumes from the last round
        done.
        """
        with self._lock:
            for client, version in list(self._held):
                versions = self._versions[client]
                if not versions[version] and version < max(versions):
                    del versions[version]
                    self._let_go(client, version)

    def flush(self) -> None:
        """Writes all versions that are only in memory to files. A run can then resume from a checkpoint written now."""
        with self._lock:
            for client, version in self._held:
                self._to_file(client, version)

    def prune(self, attempts: Sequence[int]) -> None:
        """Deletes the files that no checkpoint needs, if each checkpoint's next round has one of these numbers."""
        with self._lock:
            for client, versions in _listed(self.folder).items():
                for version in versions - {_newest(versions, attempt) for attempt in attempts}:
                    _path(self.folder, client, version).unlink(missing_ok=True)
                    self._let_go(client, version)
                    self._versions.get(client, {}).pop(version, None)

    def _in_files(self, attempt: int) -> dict[int, dict[int, bool]]:
        """Returns for each client the versions in files from before round number `attempt`."""
        return {client: {v: True for v in found if v < attempt} for client, found in _listed(self.folder).items()}

    def _to_file(self, client: int, version: int) -> None:
        if not self._versions[client][version]:
            self._write(client, version, self._held[client, version])
            self._versions[client][version] = True

    def _write(self, client: int, version: int, tensors: Mapping[str, Tensor]) -> None:
        message = _EXACT.bind(schema_of(tensors)).encode(tensors, Key(self._seed, version, client)).message
        with written_whole(_path(self.folder, client, version)) as file:
            file.write(message)

    def _let_go(self, client: int, version: int) -> None:
        self._bytes -= _size(self._held.pop((client, version), {}))


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _newest(versions: Iterable[int], attempt: int) -> int | None:
    return max((version for version in versions if version < attempt), default=None)


def _path(folder: Path, client: int, version: int) -> Path:
    return folder / f"{client}_{version}.residual"


def _listed(folder: Path) -> dict[int, set[int]]:
    """Returns for each client the versions in files."""
    found: dict[int, set[int]] = {}
    for path in folder.iterdir():
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    return found
