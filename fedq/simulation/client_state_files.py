"""What clients keep between their rounds for error feedback: in memory as far as it may, in a run's folder beyond."""

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedq.encoding import Key, MessageError, StateDictEncoder
from fedq.encoding.state_dict import Schema
from fedq.errors import FedqError
from fedq.files import written_whole

_EXACT = StateDictEncoder()
_NAME = re.compile(r"(\d+)_(\d+)\.residual")
_MARK = "ranks"


class ResidualError(FedqError):
    """What clients kept cannot be used; says which file or folder and why."""


class Residuals:
    """A `fedq.learning.client_state.ResidualStore` in a run's folder.

    A version is a client's residual after the round of one serial number. At most `memory` bytes of tensors are held;
    beyond them the least recently used are written to files, one a version, called CLIENT_SERIAL.residual. A file is
    an exact message of that client and round, checked as messages are. Files never change: a round that is done again
    writes what it wrote before.

    With `shared` nothing is held: ranks write and read the files of one folder, which must be on a disk that shows all
    of them a finished file at once. A client's next round may be on another rank, and is not before this one has ended.
    """

    def __init__(self, folder: Path, seed: int, memory: int = 2**30, shared: bool = False) -> None:
        """`seed` is the run's. Call `begin` before anything else."""
        self.folder = folder.absolute()
        self._seed, self._limit, self._shared = seed, memory, shared
        self._held: OrderedDict[tuple[int, int], Mapping[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._versions: dict[int, dict[int, bool]] = {}  # of each client: is it in a file?
        self._listed = -1
        self._lock = threading.Lock()

    @classmethod
    def joined(cls, folder: str, mark: str, seed: int) -> "Residuals":
        """Returns the store in another rank's folder, given what `mark` returned there.

        Raises ResidualError where this rank does not see that folder.
        """
        store = cls(Path(folder), seed, shared=True)
        try:
            seen = (store.folder / _MARK).read_text()
        except OSError:
            seen = ""
        if seen != mark:
            raise ResidualError(
                f"this rank cannot see {folder}: with encoder.upload.error_feedback all ranks must share rank 0's "
                "folder; set hydra.run.dir to one on a shared disk"
            )
        return store

    def mark(self) -> str:
        """Leaves a mark in the folder, by which a rank knows that it sees this one and not its own of that name."""
        mark = secrets.token_hex(8)
        with written_whole(self.folder / _MARK) as file:
            file.write(mark.encode())
        return mark

    def begin(self, serial: int, source: Path | None = None) -> None:
        """Goes on with what rounds before number `serial` left in `source`, this or another run's folder of residuals.

        What later rounds left is ignored; `prune` removes it. Without `source` there is nothing to go on with.
        """
        if source and not source.is_dir():
            raise ResidualError(f"{source} is missing: without it clients' error feedback cannot go on")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.tmp"):
            path.unlink(missing_ok=True)
        if source and source.absolute() != self.folder:
            for client, versions in _listed(source).items():
                if (version := _newest(versions, serial)) is not None:
                    with written_whole(_path(self.folder, client, version)) as file:
                        file.write(_path(source, client, version).read_bytes())
        self._versions = self._in_files(serial) if source else {}

    def load(self, client: int, serial: int, schema: Schema) -> Mapping[str, Tensor]:
        """Returns the client's newest residual from before round number `serial`, empty if there is none.

        `schema` is what it was saved as. Raises ResidualError, naming the file, where that is damaged.
        """
        with self._lock:
            if self._shared and serial != self._listed:
                self._versions, self._listed = self._in_files(serial), serial
            version = _newest(self._versions.get(client, ()), serial)
            if version is None:
                return {}
            if (client, version) in self._held:
                self._held.move_to_end((client, version))
                return self._held[client, version]
        path = _path(self.folder, client, version)
        try:
            return _EXACT.decode(path.read_bytes(), Key(self._seed, version, client), schema)[0]
        except (OSError, MessageError) as error:
            raise ResidualError(f"residual file {path} cannot be used: {error}") from error

    def save(self, client: int, serial: int, residual: Mapping[str, Tensor]) -> None:
        """Keeps the client's residual after round number `serial`: finite tensors on the CPU, never changed again.

        Raises OSError where a file cannot be written; on ranks ResidualError, which names it.
        """
        if self._shared:
            try:
                self._write(client, serial, residual)
            except OSError as error:
                path = _path(self.folder, client, serial)
                raise ResidualError(f"residual file {path} cannot be written: {error}") from error
            return
        with self._lock:
            versions = self._versions.setdefault(client, {})
            for version, in_file in versions.items():
                if in_file:  # will not be asked for again before a resume
                    self._let_go(client, version)
            self._let_go(client, serial)
            versions[serial] = False
            self._held[client, serial] = residual
            self._bytes += _size(residual)
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
        """Writes all that is only in memory. A checkpoint written after this can be gone on from."""
        with self._lock:
            for client, version in self._held:
                self._to_file(client, version)

    def prune(self, serials: Sequence[int]) -> None:
        """Deletes the files that no checkpoint whose next round has one of these serial numbers can ask for."""
        with self._lock:
            for client, versions in _listed(self.folder).items():
                for version in versions - {_newest(versions, serial) for serial in serials}:
                    _path(self.folder, client, version).unlink(missing_ok=True)
                    self._let_go(client, version)
                    self._versions.get(client, {}).pop(version, None)

    def _in_files(self, serial: int) -> dict[int, dict[int, bool]]:
        """Returns the versions in files from before round number `serial`, of each client."""
        return {client: {v: True for v in found if v < serial} for client, found in _listed(self.folder).items()}

    def _to_file(self, client: int, version: int) -> None:
        if not self._versions[client][version]:
            self._write(client, version, self._held[client, version])
            self._versions[client][version] = True

    def _write(self, client: int, version: int, residual: Mapping[str, Tensor]) -> None:
        message, _ = _EXACT.encode(residual, Key(self._seed, version, client))
        with written_whole(_path(self.folder, client, version)) as file:
            file.write(message)

    def _let_go(self, client: int, version: int) -> None:
        self._bytes -= _size(self._held.pop((client, version), {}))


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _newest(versions: Iterable[int], serial: int) -> int | None:
    return max((version for version in versions if version < serial), default=None)


def _path(folder: Path, client: int, version: int) -> Path:
    return folder / f"{client}_{version}.residual"


def _listed(folder: Path) -> dict[int, set[int]]:
    """Returns the versions of each client that are in files."""
    found: dict[int, set[int]] = {}
    for path in folder.iterdir():
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    return found
