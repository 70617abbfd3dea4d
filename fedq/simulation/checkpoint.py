"""Checkpoints: all of a run's state in one file, which is complete or absent."""

import logging
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fedq.config_differences import config_differences
from fedq.errors import FedqError
from fedq.files import remove_leftovers, written_whole
from fedq.learning import ServerState
from fedq.simulation.earlier import in_short, is_inside

log = logging.getLogger(__name__)


class CheckpointError(FedqError):
    """A checkpoint cannot be used. The text names the file and the reason."""


def save(state: ServerState, config: dict[str, Any], folder: Path, keep: int, best: int | None = None) -> Path:
    """Writes `state` and the run's configuration to a new file in `folder`, and returns the file's path.

    The file gets its name after all bytes are on the disk. The newest `keep` files stay,
    and the file of round `best`. Files of later rounds are
    deleted, because the run was resumed from an earlier round. Raises OSError with the path if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    path = folder / f"round_{state.round:06d}.pt"
    content = {field.name: getattr(state, field.name) for field in fields(state)} | {"config": config}
    with written_whole(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's zip writer raises RuntimeError after the OSError of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
    others = _newest_first(folder)
    later = [other for other in others if _round(other) > state.round]
    older = [other for other in others[len(later) + keep :] if _round(other) != best]
    for other in [*later, *older]:
        other.unlink()
    return path


def copy_best(best: int | None, source: Path, folder: Path) -> None:
    """Copies the checkpoint of round `best` from `source` to `folder`, if `source` has the checkpoint."""
    if best is None or source.absolute() == folder.absolute():
        return
    path = source / f"round_{best:06d}.pt"
    if path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / path.name) as file:
            file.write(path.read_bytes())


def attempts(folder: Path) -> list[int]:
    """Returns the attempt number of the next round of each usable checkpoint in `folder`."""
    found = []
    for path in _newest_first(folder):
        with suppress(FedqError):
            found.append(load(path)[0].attempt)
    return found


def load(path: Path) -> tuple[ServerState, dict[str, Any]]:
    """Returns the state in a checkpoint and its run's configuration. Nothing in the file can run code.

    Raises CheckpointError, with the file's path, if the file is damaged or holds other values than a state has. Raises
    FedqError if the file is whole, but lacks what a round needs: no older file may replace it unasked.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch's files are zip archives, with a CRC-32 of each part
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} fails its checksum")
            if any(entry.external_attr for entry in archive.infolist()):  # torch ignores the bytes of a folder entry
                raise zipfile.BadZipFile("a tensor is marked as a folder")
        content = torch.load(path, map_location="cpu", weights_only=True)
        config = content.pop("config")
        state = ServerState.from_saved(content)
        for name, kind in get_type_hints(ServerState).items():
            if not _matches(getattr(state, name), kind):
                raise TypeError(f"{name} is of another type")
        if not isinstance(config, dict) or state.attempt >= 2**32:  # no message could have such a key
            raise TypeError("the configuration is of another type, or the round's number too large")
        return state, config
    except (AttributeError, LookupError, TypeError) as error:  # written by torch, but not by fedq
        raise CheckpointError(f"checkpoint {path} cannot be used: it is not a checkpoint of fedq") from error
    except FedqError as error:
        raise FedqError(f"checkpoint {path} cannot be used: {error}") from error
    except Exception as error:  # zipfile and torch raise many classes of errors for foreign bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint {path} cannot be used: {reason}") from error


def resume(where: str, folder: Path, config: dict[str, Any]) -> tuple[ServerState, Path] | None:
    """Returns the state to resume from and the folder of its run, None for a new run.

    where: "never"; "auto", the newest usable checkpoint in `folder`; or the path of a checkpoint or of a run's folder.
        A path counts if the run has no checkpoint of its own, or if the path is inside `folder`.
    folder: the run's folder.
    config: the run's plain configuration.

    Raises CheckpointError if `where` names a checkpoint or `folder` has one, but no checkpoint is usable. Raises
    CheckpointError if the checkpoint's configuration differs from `config`.
    """
    if where == "never":
        return None
    path = folder if where == "auto" else Path(where)
    if not is_inside(path, folder) and (own := resume("auto", folder, config)):  # the same command is repeated
        return own
    candidates = [path] if path.is_file() else _newest_first(path / "checkpoints")
    for candidate in candidates:
        try:
            state, its_config = load(candidate)
        except CheckpointError as error:
            log.warning("%s", error)
            continue
        if differing := config_differences(its_config, config, continuing=state.round < config["run"]["rounds"]):
            raise CheckpointError(
                f"run.resume: {candidate} is of another run: {in_short(differing)}; set hydra.run.dir to a new folder"
            )
        return state, candidate.parent.parent
    if candidates or where != "auto":
        raise CheckpointError(f"run.resume: there is no usable checkpoint in {path}; start afresh in a new folder")
    return None


def _matches(value: Any, kind: Any) -> bool:
    """Returns whether a value is of an annotated type.

    All numbers of a state are counts or norms, so negative numbers are refused.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value < 2**63
    if kind is Tensor:
        return isinstance(value, Tensor) and value.layout is torch.strided
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_matches(item, expected) for pair in items for item, expected in zip(pair, arguments, strict=True))
    return kind is Any or isinstance(value, origin)


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round_"))


def _newest_first(folder: Path) -> list[Path]:
    paths = (path for path in folder.glob("round_*.pt") if path.stem.removeprefix("round_").isdecimal())
    return sorted(paths, key=_round, reverse=True)
