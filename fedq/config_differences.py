"""Compares the configurations of an earlier run and of this run, by the objects that they build."""

import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from hydra.utils import instantiate

from fedq.config import CHANGES_NOTHING, NO_CODER, coder_that_fits
from fedq.config_check import RENAMED_KEYS, call_or_config_error
from fedq.config_nodes import DirectionConfig, EncoderConfig, RunConfig

RESUMABLE_KEYS = (*CHANGES_NOTHING, "run.rounds", "run.evaluate_every", "run.evaluate_clients", "run.patience")
"""The keys that may change when a run resumes. These keys change no result."""

FUTURE_ONLY_KEYS = ("run.min_clients", "run.repeats", "dataset.path")
"""Further keys that may change when a run resumes.

These keys affect only later rounds. A dataset's folder may have moved.
"""

OLD_DEFAULTS = {
    "algorithm": {"_target_": "fedq.learning.FedAvg"},
    "task": {"_target_": "fedq.learning.Classification"},
}
"""Defaults for keys that older configurations lack."""

_RENAMED_TARGETS = {"fedq.encoding.Best": "fedq.encoding.Shortest"}
"""Classes of the previous version → today's names."""

_KINDS = {
    "run": RunConfig,
    "encoder": EncoderConfig,
    "encoder.broadcast": DirectionConfig,
    "encoder.upload": DirectionConfig,
}
"""Dataclasses of the nodes without a `_target_`."""


def config_differences(there: Mapping[str, Any], here: Mapping[str, Any], continuing: bool = True) -> list[str]:
    """Returns in words how the objects of an earlier run differ from the objects of this run; [] if they are equal.

    there: The earlier run's plain configuration, from a checkpoint or a summary. Nothing in it is imported or called.
    here: This run's plain configuration.
    continuing: Whether this run has rounds left.
    """
    resumable = RESUMABLE_KEYS + FUTURE_ONLY_KEYS if continuing else RESUMABLE_KEYS
    return [
        f"{path} was {_in_words(old)}, not {_in_words(new)}"
        for path, old, new in _differing({**OLD_DEFAULTS, **there}, {**OLD_DEFAULTS, **here}, "")
        if path not in resumable
    ]


def _differing(there: Any, here: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields path and both values wherever two plain configurations differ.

    Where the classes of a part differ, their arguments are not compared. An argument that one side lacks has the
    class's default. Keys of the encoder to which only ${…} refer are not compared.
    """
    if isinstance(there, dict) and isinstance(here, dict) and _target(there) == _target(here):
        there, here = (_with_todays_keys(node, path) for node in (there, here))
        _give_coder(there, here, path)
        kind = _KINDS.get(path)
        parameters = _parameters(here.get("_target_", kind))
        keys = ((there.keys() | here.keys()) & parameters.keys()) if kind else there.keys() | here.keys()
        for key in sorted(keys - {"_target_"}, key=str):
            old, new = (node.get(key, parameters.get(key, "absent")) for node in (there, here))
            yield from _differing(old, new, f"{path}.{key}" if path else str(key))
    elif isinstance(there, list) and isinstance(here, list) and list(map(_target, there)) == list(map(_target, here)):
        for i, (old, new) in enumerate(zip(there, here, strict=True)):
            yield from _differing(old, new, f"{path}[{i}]")
    elif there != here:
        yield path, there, here


def _with_todays_keys(node: dict[str, Any], path: str) -> dict[str, Any]:
    """Returns a copy of the node at `path`, with today's names as keys."""
    renamed = {old.rpartition("."): new.rpartition(".")[2] for old, new in RENAMED_KEYS.items()}
    return {renamed.get((path, ".", key), key): value for key, value in node.items()}


def _give_coder(there: dict[str, Any], here: dict[str, Any], path: str) -> None:
    """If only one of two chains has a coder, sets the other one's coder to the coder that fits its stages."""
    nameless = [node for node in (there, here) if node.get("coder") in NO_CODER]
    old, new = there.get("stages"), here.get("stages")
    if len(nameless) != 1 or not (isinstance(old, list) and isinstance(new, list)):
        return
    if nameless[0] is here or list(map(_target, old)) == list(map(_target, new)):
        stages = [call_or_config_error(path, partial(instantiate, stage)) for stage in new]
        nameless[0]["coder"] = {"_target_": f"fedq.encoding.{type(coder_that_fits(stages, path)).__name__}"}
    else:  # the stages differ, so the coders need no comparison
        there["coder"] = here["coder"]


def _parameters(target: Any) -> dict[str, Any]:
    """Returns the parameters of a class or of a `_target_` → their defaults; "absent" without a default."""
    try:
        signature = inspect.signature(pkgutil.resolve_name(target) if isinstance(target, str) else target)
    except (ImportError, AttributeError, ValueError, TypeError):  # `check` reports such a class
        return {}
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    defaults = {name: "absent" if value is inspect.Parameter.empty else value for name, value in defaults.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def _target(node: Any) -> Any:
    """Returns today's name of the `_target_` of a plain node, or None if the node has no `_target_`."""
    target = node.get("_target_") if isinstance(node, dict) else None
    return _RENAMED_TARGETS.get(target, target) if isinstance(target, str) else target


def _in_words(node: Any) -> str:
    """Returns a plain value in words; for a node with a `_target_`, the class's name."""
    if isinstance(node, list):
        return f"[{', '.join(map(_in_words, node))}]"
    target = _target(node)
    return str(node) if target is None else str(target).rpartition(".")[2]
