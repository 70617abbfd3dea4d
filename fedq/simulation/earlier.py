"""Finds an earlier completed run of the same configuration, and describes how configurations differ."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fedq.config import to_container
from fedq.config_differences import config_differences


def finished(cfg: DictConfig, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the folder and the summary of a completed run of the configuration `cfg`, or None.

    The folder is `folder`. In a search, which may draw a choice twice, the folder may be of another job.
    """
    run = to_container(cfg, "run") or {}  # the configuration is not checked yet
    resume = str(run.get("resume"))
    if resume == "never" or (resume != "auto" and is_inside(Path(resume), folder)):
        return None
    search = HydraConfig.get().mode == RunMode.MULTIRUN and run.get("accuracy_floor") is not None
    others = sorted(Path(HydraConfig.get().sweep.dir).rglob("summary.json")) if search else []
    for path in (folder / "summary.json", *others):
        # the file may be cut short, or of another program
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            summary = json.loads(path.read_text(encoding="utf-8"))
            rounds, wanted = summary["rounds"], run["rounds"]
            early = rounds < wanted and summary.get("selection", {}).get("stopped_early", False)
            enough = rounds == wanted or early or (path.parent == folder and rounds > wanted)
            same = summary["config"]["run"].get("patience") == run.get("patience")
            same = same and not config_differences(summary["config"], to_container(cfg), continuing=False)
            if summary["status"] == "completed" and enough and same:
                return path.parent, summary
    return None


def is_inside(path: Path, folder: Path) -> bool:
    """Returns whether `path` is `folder` or below, after following soft links."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))  # Path.resolve raises for a loop


def in_short(differing: list[str]) -> str:
    """Returns the differences of two configurations as a phrase.

    If many keys of a group differ, such as the encoder's, the phrase gives the group's name and one key.
    """
    groups: dict[str, list[str]] = {}
    for text in differing:
        groups.setdefault(re.split(r"\W", text, maxsplit=1)[0], []).append(text)
    return "; ".join(
        f"the {group} differs, in {len(texts)} keys: {texts[0]}, …" if len(texts) > 3 else "; ".join(texts)
        for group, texts in groups.items()
    )
