"""Checkpoints: all of a run's state in one file, whole or not there."""

import os
from dataclasses import fields
from pathlib import Path

import torch

from fedq.learning import ServerState

KEEP = 2
"""How many checkpoints of a run stay: the newest, and one in case it is damaged."""


def save(state: ServerState, folder: Path) -> Path:
    """Writes `state` to a file of its own in `folder`, removes the oldest beyond KEEP, and returns its path.

    The file appears under its name only once all of it is on the disk.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"round_{state.round:06d}.pt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({field.name: getattr(state, field.name) for field in fields(state)}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in sorted(folder.glob("round_*.pt"))[:-KEEP]:
        old.unlink()
    return path


def load(path: Path) -> ServerState:
    """Returns the state in a checkpoint. Nothing in the file can run code."""
    return ServerState(**torch.load(path, map_location="cpu", weights_only=True))
