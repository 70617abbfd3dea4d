"""What clients keep between their rounds: in memory up to a limit, in a run's folder beyond."""

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
    """The state of a client cannot be used; says which file or folder and why."""


class ClientStateFiles:
    """A `fedq.learning.client_state.ClientStore` in a run's folder.

    A version is a client's state after the round of one attempt. At most `memory` bytes of tensors are held. Beyond
    that limit the least recently used are written to files, one a version, called CLIENT_ATTEMPT.residual. A file is an
    exact message of that client and round, checked as messages are. Files never change: a round that is run again
    writes the same bytes.

    With `shared` nothing is held: ranks write and read the files of one folder, on a disk that shows all of them a
    finished file at once. A client's next round may be on another rank, and starts after this one has ended.
    """

    def __init__(self, folder: Path, seed: int, memory: int = 2**30, shared: bool = False) -> None:
        """`seed` is the run's. Call `resume` before anything else."""
        self.folder = folder.absolute()
        self._seed, self._limit, self._shared = seed, memory, shared
        self._held: OrderedDict[tuple[int, int], Mapping[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._versions: dict[int, dict[int, bool]] = {}  # of each client: is it in a file?
        self._listed = self._newest = -1
        self._lock = threading.Lock()

    @classmethod
    def joined(cls, folder: str, mark: str, seed: int) -> "ClientStateFiles":
        """Returns the store in another rank's folder, given what `mark` returned there.

        Raises ClientStateError where this rank does not see that folder.
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
        """Leaves a mark in the folder, by which a rank knows that it sees this one and not its own of that name."""
        mark = secrets.token_hex(8)
        with written_whole(self.folder / _MARK) as file:
            file.write(mark.encode())
        return mark

    def resume(self, attempt: int, source: Path | None = None) -> None:
        """Continues with what rounds before number `attempt` left in `source`, the folder of this run or of another.

        What later rounds left is ignored, and removed by `prune`. Without `source` the clients start with nothing.
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
        """Forgets what rounds from number `attempt` on committed."""
        with self._lock:
            if attempt <= self._newest:
                for client, versions in self._versions.items():
                    for version in [version for version in versions if version >= attempt]:
                        del versions[version]
                        self._let_go(client, version)
            self._newest = attempt - 1

    def load(self, client: int, attempt: int, schema: Schema) -> Mapping[str, Tensor]:
        """Returns the client's newest version from before round number `attempt`; empty if there is none.

        `schema` is that of the committed tensors. Raises ClientStateError, naming the file, if the file is damaged.
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
        """Keeps the client's state after round number `attempt`: finite tensors on the CPU, never changed again.

        Raises OSError where a file cannot be written; on ranks ClientStateError, which names it.
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
                if in_file:  # will not be asked for again before a resume
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
        """Forgets what is only in memory and not a client's newest: no checkpoint from now on can ask for it.

        To be called between rounds, once one is done: a run that ends before goes on from the last that was.
        """
        with self._lock:
            for client, version in list(self._held):
                versions = self._versions[client]
                if not versions[version] and version < max(versions):
                    del versions[version]
                    self._let_go(client, version)

    def flush(self) -> None:
        """Writes all that is only in memory. A checkpoint written after this can be resumed."""
        with self._lock:
            for client, version in self._held:
                self._to_file(client, version)

    def prune(self, attempts: Sequence[int]) -> None:
        """Deletes the files that no checkpoint whose next round has one of these numbers can ask for."""
        with self._lock:
            for client, versions in _listed(self.folder).items():
                for version in versions - {_newest(versions, attempt) for attempt in attempts}:
                    _path(self.folder, client, version).unlink(missing_ok=True)
                    self._let_go(client, version)
                    self._versions.get(client, {}).pop(version, None)

    def _in_files(self, attempt: int) -> dict[int, dict[int, bool]]:
        """Returns the versions in files from before round number `attempt`, of each client."""
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
    """Returns the versions of each client that are in files."""
    found: dict[int, set[int]] = {}
    for path in folder.iterdir():
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    return found
