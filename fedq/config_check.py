"""Checks the keys and values of a configuration against the signatures of constructors."""

import importlib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedq.errors import FedqError

DIRECTIONS = ("broadcast", "upload")

NESTED_GROUPS = ("client.augment", "dataset.partition", "run.faults", "run.guard", "run.network", "run.submodel")
"""Keys whose values are the files of a group: client/augment=crop_and_flip sets client.augment."""

RENAMED_KEYS = {
    "run.dropout": "run.submodel",
    "run.faults.dropout": "run.faults.absent",
    "encoder.broadcast.pace": "encoder.broadcast.rate_control",
    "encoder.upload.pace": "encoder.upload.rate_control",
}
"""Keys of the previous version → today's names."""


class ConfigError(FedqError):
    """A configuration is wrong. The text is one sentence: the key, its value, and the allowed values."""


def to_container(cfg: Any, path: str = "", resolve: bool = True) -> Any:
    """Returns the node at `path` as plain dicts and lists; all of `cfg` without a path.

    resolve: Replace each ${…} by the value that it refers to.
    Raises ConfigError for a ${…} that has no value, and for a value that is missing ("???").
    """
    try:
        node = OmegaConf.select(cfg, path) if path else cfg
        return (
            OmegaConf.to_container(node, resolve=resolve, throw_on_missing=True) if OmegaConf.is_config(node) else node
        )
    except RecursionError as error:
        raise ConfigError(f"{path}: a ${{…}} refers to what holds it") from error
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def explain(error: Exception) -> str:
    """Returns one sentence about an error of Hydra or OmegaConf in the command line or a YAML file."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    parent = getattr(cause, "parent_node", None)
    text = " ".join(line.strip() for line in str(error).split("\nConfig search path")[0].splitlines() if line.strip())
    if key and isinstance(parent, DictConfig) and "not in" in str(cause).splitlines()[0]:
        allowed = ", ".join(sorted(map(str, parent))) or "none"
        others = f", and with +{key}=… the other arguments of its class" if "_target_" in parent else ""
        return moved(key, parent) or f"{key} is not a key; allowed here: {allowed}{others}"
    if key:
        reason = str(cause).splitlines()[0]
        if reason.startswith("Missing mandatory value"):
            return f"{key} has no value: set {key}=…"
        return f"{key}: {'its ${…} refers to itself' if reason.startswith('Recursive') else reason}"
    if re.search(r"Could not (find|load) 'hydra/(launcher|sweeper)/", text):
        return f'{text} (some come with pip install "fedq[sweep]")'
    return text


def moved(key: str, parent: typing.Mapping[Any, Any]) -> str:
    """Returns a sentence that names the new key of an old `key`, or "" if this version has no new key.

    parent: The node in which `key` is not allowed.
    """
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return f"{old} is now {new}"
        if key == old.replace(".", "/"):
            return f"{key} is now {new.replace('.', '/')}"
    group, _, name = key.partition(".")
    sides = [side for side in DIRECTIONS if group == "encoder" and name in (parent.get(side) or ())]
    if len(sides) == 1:
        return (
            f"{key} sets both directions; this encoder has {name} in the {sides[0]} alone: "
            f"use encoder.{sides[0]}.{name}"
        )
    return f"{key} is not a key: use encoder.broadcast.{name} or encoder.upload.{name}" if sides else ""


def check_is_built(cfg: DictConfig, path: str) -> None:
    """Raises ConfigError unless the node at `path` has a `_target_`."""
    node = to_container(cfg, path)
    if not isinstance(node, dict) or node.get("_target_") is None:
        raise ConfigError(f"{path}._target_ is missing")


def check_targets(cfg: DictConfig, path: str) -> None:
    """Checks every node with a `_target_` at or below `path` against the target's signature."""
    node = to_container(cfg, path)
    if isinstance(node, dict):
        if node.get("_target_") is not None:
            try:
                target = pkgutil.resolve_name(node["_target_"])
            except (ImportError, AttributeError, ValueError, TypeError) as error:
                # if the import of a module fails, pkgutil only says that the package has no such attribute
                reason = (isinstance(error, AttributeError) and import_error(node["_target_"])) or error
                raise ConfigError(f"{path}._target_: {node['_target_']!r} cannot be imported: {reason}") from error
            if not callable(target):
                raise ConfigError(f"{path}._target_: {node['_target_']!r} is not a class or function")
            check_arguments(cfg, path, target)
        children = [(f"{path}.{key}", value) for key, value in node.items()]
    else:
        children = [(f"{path}[{i}]", value) for i, value in enumerate(node)]
    for child, value in children:
        if isinstance(value, dict | list):
            check_targets(cfg, child)


def import_error(target: str) -> ImportError | None:
    """Returns the error that a module of the dotted name `target` raises, such as for a package that is missing."""
    modules = target.split(".")
    for last in range(1, len(modules)):
        try:
            importlib.import_module(module := ".".join(modules[:last]))
        except ImportError as error:
            return None if error.name == module else error
    return None


def check_arguments(cfg: DictConfig, path: str, target: Any, knobs: set[str] | None = None) -> None:
    """Checks the keys and values of the node at `path` against the signature of `target`.

    knobs: Further keys that the node may have because a ${…} refers to them.
    """
    node = to_container(cfg, path)
    if not isinstance(node, dict):
        raise ConfigError(f"{path}: {node!r} is not allowed; it must be keys and values")
    # schedule is a key of the group `server`, not an argument of the optimizer's class
    reserved = ("_target_", "_partial_", "schedule") if path == "server" else ("_target_", "_partial_")
    given = {key: value for key, value in node.items() if key not in reserved}
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some classes written in C have no signature
        return
    try:
        hints = typing.get_type_hints(target.__dict__.get("__init__", target) if isinstance(target, type) else target)
    except NameError:  # the annotation names a class that only type checkers import
        hints = {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # the code adds these arguments; the first one is an optimizer's parameters, or a schedule's optimizer
    if path == "client.optimizer" and "lr" in given:
        raise ConfigError("client.optimizer.lr is not a key: set client.lr")
    first = list(parameters)[:1]
    added = {
        "model": ["num_classes"],
        "server": first,
        "client.optimizer": [*first, "lr"],
        "client.schedule": first,
        "server.schedule": first,
    }.get(path, [])
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and name not in given and name not in added:
            raise ConfigError(f"{path}.{name} is missing")
    for key, value in given.items():
        place = _origin(cfg, f"{path}.{key}")
        if key not in parameters:
            if takes_any or key in (knobs or ()):
                continue
            others = ", and keys that a ${…} refers to" if knobs is not None else ""
            allowed = ", ".join(name for name in parameters if name not in added)
            allowed_here = f"{path}.{key} is not a key; allowed here: {allowed}{others}"
            raise ConfigError(moved(f"{path}.{key}", node) or allowed_here)
        allowed = hints.get(key, Any)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{place}: {value} is not a finite number")
        takes_text = not {Any, str}.isdisjoint({allowed, *typing.get_args(allowed)})
        if isinstance(value, str) and f"{path}.{key}" in NESTED_GROUPS and not takes_text:
            file = f"{path}/{key}={value}"
            raise ConfigError(f"{place}: {value!r} is not allowed; {file} chooses a file of the group {path}/{key}")
        if not matches_type(value, allowed):
            raise ConfigError(f"{place}: {value!r} is not allowed; it must be {type_in_words(allowed)}")


def takes(target: str, name: str) -> bool:
    """Returns whether the class or function `target` takes an argument `name`. A **kwargs takes every name."""
    try:
        parameters = inspect.signature(pkgutil.resolve_name(target)).parameters
    except ValueError:  # some classes written in C have no signature
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def references(node: Any, path: str, holder: str = "") -> set[str]:
    """Returns the paths that the ${…} at or below the node at `path` refer to.

    node: Plain, not resolved.
    holder: The path of the node that holds this one.
    """
    if isinstance(node, dict):
        return set().union(*(references(value, f"{path}.{key}", path) for key, value in node.items()))
    if isinstance(node, list):
        return set().union(*(references(value, f"{path}[{i}]", path) for i, value in enumerate(node)))
    if not isinstance(node, str):
        return set()
    return {resolve_reference(holder, name) for name in re.findall(r"\$\{([\w.]+)\}", node)}


def resolve_reference(holder: str, name: str) -> str:
    """Returns the path to which ${name} refers in the node at `holder`."""
    path = name.lstrip(".")
    for _ in range(len(name) - len(path) - 1):  # each further dot goes one level up
        holder = re.sub(r"(\.\w+|\[[^\]]*\])$", "", holder)
    return f"{holder}.{path}" if name.startswith(".") else path


def _origin(cfg: DictConfig, path: str) -> str:
    """Returns the path that holds the value of `path`, after following every ${…}, such as ${encoder.bits}."""
    holder, _, key = path.rpartition(".")
    written = to_container(cfg, holder, resolve=False)[key]
    if not (isinstance(written, str) and re.fullmatch(r"\$\{[\w.]+\}", written)):
        return path
    return _origin(cfg, resolve_reference(holder, written[2:-1]))


_WORDS: dict[Any, str] = {
    **{int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"},
    **{list: "a list", Sequence: "a list", dict: "keys and values"},
}


def matches_type(value: Any, allowed: Any) -> bool:
    """Returns whether a `value` from YAML is of the annotated type `allowed`. True for types that YAML cannot hold."""
    origin = typing.get_origin(allowed)
    if origin in (typing.Union, types.UnionType):
        is_built = isinstance(value, dict) and "_target_" in value  # may become an object that YAML cannot hold
        options = typing.get_args(allowed) if is_built else _yaml_members(allowed)
        return any(matches_type(value, option) for option in options)
    if origin is Literal:
        return value in typing.get_args(allowed)
    if allowed is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if allowed is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if allowed in _WORDS:
        return isinstance(value, allowed)
    if (origin or allowed) in (list, dict):
        return isinstance(value, origin or allowed)
    if origin is Sequence:
        return isinstance(value, list) and all(matches_type(item, typing.get_args(allowed)[0]) for item in value)
    if origin is tuple and ... not in typing.get_args(allowed):  # YAML has no tuples, only lists
        members = typing.get_args(allowed)
        return isinstance(value, list) and len(value) == len(members) and all(map(matches_type, value, members))
    return True


def _yaml_members(union: Any) -> list[Any]:
    """Returns the members of a union that YAML can hold, or all members if YAML can hold none."""
    members = list(typing.get_args(union))
    return [m for m in members if m in _WORDS or typing.get_origin(m) in (Literal, list, dict)] or members


def type_in_words(allowed: Any) -> str:
    """Returns an annotated type in words."""
    origin = typing.get_origin(allowed)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_in_words(option) for option in _yaml_members(allowed))
    if origin is Literal:
        return " or ".join(map(str, typing.get_args(allowed)))
    if origin is tuple:
        return f"a list of {', '.join(map(type_in_words, typing.get_args(allowed)))}"
    return _WORDS.get(origin or allowed, str(allowed))


def call_or_config_error(path: str, function: Callable[[], Any]) -> Any:
    """Calls `function`; a TypeError, ValueError or LookupError becomes a ConfigError that names `path`."""
    try:
        return function()
    except (HydraException, TypeError, ValueError, LookupError) as error:
        cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
        if isinstance(cause, TypeError | ValueError | LookupError):
            raise ConfigError(f"{path}: {cause}") from error
        raise cause from error


def overridden(overrides: Iterable[str]) -> set[str]:
    """Returns the keys and groups that the overrides of a command line set, add or delete."""
    # Hydra keeps its overrides in a configuration, where a ${…} in one would be resolved
    return {override.split("=")[0].lstrip("+~") for override in to_container(overrides, resolve=False)}
