"""Checkpoints: all of a run's state in one file, whole or not there."""

import logging
import zipfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin

import torch

from fedq.config import differences
from fedq.errors import FedqError
from fedq.files import written_whole
from fedq.learning import ServerState

log = logging.getLogger(__name__)


class CheckpointError(FedqError):
    """A checkpoint cannot be used; says which and why."""


def save(state: ServerState, config: dict[str, Any], folder: Path, keep: int) -> Path:
    """Writes `state` and the run's configuration to a file of its own in `folder`, and returns its path.

    The file appears under its name only once all of it is on the disk. The newest `keep` files stay. Those of later
    rounds go: the run that wrote them was taken back to an earlier one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round_{state.round:06d}.pt"
    with written_whole(path) as file:
        torch.save({field.name: getattr(state, field.name) for field in fields(state)} | {"config": config}, file)
    others = _newest_first(folder)
    later = [other for other in others if _round(other) > state.round]
    for other in [*folder.glob("round_*.tmp"), *later, *others[len(later) + keep :]]:
        other.unlink()
    return path


def serials(folder: Path) -> list[int]:
    """Returns the serial number of the next round of each checkpoint in `folder` that can be used."""
    found = []
    for path in _newest_first(folder):
        with suppress(CheckpointError):
            found.append(load(path)[0].serial)
    return found


def load(path: Path) -> tuple[ServerState, dict[str, Any]]:
    """Returns the state in a checkpoint and its run's configuration. Nothing in the file can run code.

    Raises CheckpointError, naming the file, where it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch's files are zip archives, with a CRC-32 of each part
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} fails its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        config = content.pop("config")
        state = ServerState(**content)
        kinds: dict[str, Any] = {field.name: field.type for field in fields(state)}
        if not all(isinstance(getattr(state, name), get_origin(kind) or kind) for name, kind in kinds.items()):
            raise TypeError("a field is of another type")
        if not isinstance(config, dict):
            raise TypeError("the configuration is of another type")
        return state, config
    except (AttributeError, LookupError, TypeError) as error:  # a file of torch's, but of other things
        raise CheckpointError(f"checkpoint {path} cannot be used: it is not one of this program's") from error
    except Exception as error:  # whatever zipfile and torch raise for bytes that are none of theirs
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint {path} cannot be used: {reason}") from error


def resume(where: str, folder: Path, config: dict[str, Any]) -> tuple[ServerState, Path] | None:
    """Returns the state to go on from and the folder of the run it is from, None to start afresh.

    `where` is "never", "auto" (the newest usable checkpoint in `folder`, if any), or the path of a checkpoint or of a
    run's folder; it is for a run that has no checkpoint of its own, or goes back to one of these. Raises
    CheckpointError where there should be a checkpoint and none is usable, and where it is of another configuration than
    `config`.
    """
    if where == "never":
        return None
    path = folder if where == "auto" else Path(where)
    elsewhere = not path.resolve().is_relative_to(folder.resolve())
    if elsewhere and (own := resume("auto", folder, config)):  # the same command, given again
        return own
    candidates = [path] if path.is_file() else _newest_first(path / "checkpoints")
    for candidate in candidates:
        try:
            state, its_config = load(candidate)
        except CheckpointError as error:
            log.warning("%s", error)
            continue
        if differing := differences(its_config, config, going_on=state.round < config["run"]["rounds"]):
            raise CheckpointError(
                f"run.resume: {candidate} is of another run: {'; '.join(differing)}; set hydra.run.dir to a new folder"
            )
        return state, candidate.parent.parent
    if candidates or where != "auto":
        raise CheckpointError(f"run.resume: there is no usable checkpoint in {path}; start afresh in a new folder")
    return None


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round_"))


def _newest_first(folder: Path) -> list[Path]:
    paths = (path for path in folder.glob("round_*.pt") if path.stem.removeprefix("round_").isdecimal())
    return sorted(paths, key=_round, reverse=True)
