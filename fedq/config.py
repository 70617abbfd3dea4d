"""From the command line's vocabulary to objects, and one clear sentence for whatever is wrong with it.

Each part of a configuration that has a `_target_` is described by that class's own constructor: its parameters are the
keys allowed, its annotations the types. So a new dataset, model, stage or optimizer needs a YAML file and nothing here.
What has no `_target_`, the groups `run` and `encoder`, is described by the dataclasses below.
"""

import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedq.errors import FedqError

Node = Mapping[str, Any]


class ConfigError(FedqError):
    """One sentence: which key is wrong, what was given, what is allowed."""


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, who takes part, and what it keeps.

    test_batch_size: examples an evaluation batch. workers: threads a rank, "auto" for one a core. evaluate_every and
    checkpoint_every: in rounds; the last round is always evaluated and kept. keep: checkpoints that stay. resume:
    "auto" goes on from the newest checkpoint in the run's folder, "never" does not, a path is that of a checkpoint or
    of a run's folder. min_clients: a round with fewer usable updates is repeated with another cohort, up to `repeats`
    times in a row, and then ends the run. precision: of forward and backward passes. faults, guard: what goes wrong
    with clients, and what is done about updates out of line. submodel: how much of the model each client trains.
    accuracy_floor: the final test accuracy, from 0 to 1, at which hydra/sweeper=fewest_bits looks for the fewest bits.
    residual_memory: MiB of memory for what clients keep with error feedback; beyond it what was least recently used is
    in files.
    """

    rounds: int
    clients_per_round: int
    seed: int
    evaluate_every: int
    test_batch_size: int
    checkpoint_every: int
    keep: int
    resume: str
    min_clients: int
    repeats: int
    workers: int | Literal["auto"]
    device: str
    precision: Literal["float32", "bf16"]
    faults: dict[str, Any] | None
    guard: dict[str, Any] | None
    submodel: dict[str, Any] | None
    accuracy_floor: float | None = None
    residual_memory: int = 1024

    def __post_init__(self) -> None:
        counts = ("rounds", "clients_per_round", "evaluate_every", "test_batch_size", "checkpoint_every", "keep")
        for name in (*counts, "min_clients", "workers"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("repeats", "residual_memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.min_clients > self.clients_per_round:
            raise ValueError(f"min_clients={self.min_clients} is more than clients_per_round={self.clients_per_round}")
        if self.accuracy_floor is not None and not 0 <= self.accuracy_floor <= 1:
            raise ValueError(f"accuracy_floor must be from 0 to 1, not {self.accuracy_floor}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")


@dataclass(frozen=True)
class RuleConfig:
    """A chain of their own for the tensors whose names fit a pattern, as a shell's; the first that fits counts."""

    pattern: str
    stages: list[Any]
    coder: dict[str, Any]


@dataclass(frozen=True)
class DirectionConfig:
    """What encodes one direction: a chain of stages and its coder, each with a `_target_`, and RuleConfigs.

    joint, reference, common_scale, error_feedback, rate_control: see StateDictEncoder.
    """

    stages: list[Any]
    coder: dict[str, Any]
    rules: list[Any] = field(default_factory=list)
    joint: bool = False
    reference: Literal["none", "initial", "last"] = "none"
    common_scale: bool = False
    error_feedback: bool = False
    rate_control: dict[str, Any] | None = None


@dataclass(frozen=True)
class EncoderConfig:
    """Both directions. Other keys of the YAML file (bits …) are there to be referred to."""

    threshold: int
    broadcast: dict[str, Any]
    upload: dict[str, Any]


_GROUPS = ("dataset", "model", "client", "server", "run")
"""The groups of a configuration beside `encoder`."""

_OPTIONS = ("joint", "reference", "common_scale", "error_feedback")
"""The keys of a direction that StateDictEncoder takes as they are."""


def check(cfg: DictConfig, overrides: Iterable[str] = ()) -> None:
    """Raises ConfigError unless every key of a composed configuration is known and of the right type.

    `overrides` are the command line's, which may replace what used another key, but must set none in vain.
    """
    given = overridden(overrides)
    if unknown := sorted(map(str, cfg.keys() - {*_GROUPS, "encoder", "hydra"})):
        raise ConfigError(f"{unknown[0]} is not a key; allowed here: {', '.join((*_GROUPS, 'encoder'))}")
    build_run(cfg)
    for group in _GROUPS:
        if group != "run":
            _check_is_built(cfg, group)
            partial = group in ("model", "server")
            if plain(cfg, group).get("_partial_", False) is not partial:
                raise ConfigError(f"{group}._partial_ must be {str(partial).lower()}")
        _check_targets(cfg, group)
    for name in ("faults", "guard", "submodel"):
        if plain(cfg, f"run.{name}") is not None:
            _check_is_built(cfg, f"run.{name}")
    if "num_classes" in plain(cfg, "model"):
        raise ConfigError("model.num_classes is not a key: it is the dataset's")
    _check_arguments(cfg, "encoder", EncoderConfig, _knobs(cfg, "encoder", given))
    for direction in ("encoder.broadcast", "encoder.upload"):
        _check_arguments(cfg, direction, DirectionConfig, _knobs(cfg, direction, given))
        if plain(cfg, direction).get("rate_control") is not None:
            _check_is_built(cfg, f"{direction}.rate_control")
        rules = [f"{direction}.rules[{i}]" for i in range(len(plain(cfg, direction).get("rules", [])))]
        for rule in rules:
            _check_arguments(cfg, rule, RuleConfig)
        patterns = [plain(cfg, rule)["pattern"] for rule in rules]
        if twice := {pattern for pattern in patterns if patterns.count(pattern) > 1}:
            raise ConfigError(f"{direction}.rules: {min(twice)!r} is there twice; the first that fits counts")
        for chain in (direction, *rules):
            for i in range(len(plain(cfg, chain)["stages"])):
                _check_is_built(cfg, f"{chain}.stages[{i}]")
            _check_is_built(cfg, f"{chain}.coder")
        _check_targets(cfg, direction)


def build_run(cfg: DictConfig) -> RunConfig:
    """Returns the checked group `run`."""
    _check_arguments(cfg, "run", RunConfig)
    run: RunConfig = _call("run", lambda: RunConfig(**plain(cfg, "run")))
    return run


def build(cfg: DictConfig, path: str, **more: Any) -> Any:
    """Returns the object that the node at `path` (such as "dataset") describes by `_target_`, with `more` arguments."""
    # Plain containers in and out: no OmegaConf object reaches the code, whatever launcher composed the config.
    return _call(path, lambda: instantiate(plain(cfg, path), **more, _convert_="all"))


def build_server(cfg: DictConfig) -> Any:
    """Returns what builds the server optimizer, tried once: its arguments and its step are checked before any round."""
    import torch

    server = build(cfg, "server")

    def try_once() -> None:
        parameter = torch.zeros(1, requires_grad=True)
        parameter.grad = torch.zeros(1)
        try:
            server([parameter]).step()
        except RuntimeError as error:  # one for sparse gradients, say
            raise ValueError(error) from error

    _call("server", try_once)
    return server


def build_encoder(cfg: DictConfig, direction: Literal["broadcast", "upload"]) -> Any:
    """Returns the StateDictEncoder of one direction."""
    from fedq.encoding import Encoder, StateDictEncoder

    def chain(path: str) -> Encoder:
        stages = [build(cfg, f"{path}.stages[{i}]") for i in range(len(plain(cfg, f"{path}.stages")))]
        coder = build(cfg, f"{path}.coder")
        encoder: Encoder = _call(path, lambda: Encoder(stages, coder))
        return encoder

    path = f"encoder.{direction}"
    node, threshold = plain(cfg, path), plain(cfg, "encoder")["threshold"]
    rules = {rule["pattern"]: chain(f"{path}.rules[{i}]") for i, rule in enumerate(node.get("rules", []))}
    options = {name: node[name] for name in _OPTIONS if name in node}
    if node.get("rate_control"):
        options["rate_control"] = build(cfg, f"{path}.rate_control")
    main = chain(path)
    return _call("encoder", lambda: StateDictEncoder(main, threshold, rules, **options))


CHANGES_NOTHING = tuple(
    f"run.{name}" for name in ("checkpoint_every", "keep", "resume", "workers", "accuracy_floor", "residual_memory")
)
"""The keys that change no result (the simulation promise)."""

_NEUTRAL = (*CHANGES_NOTHING, "run.rounds", "run.evaluate_every")
"""The keys that may differ between a run and its continuation: they change no round's outcome."""

_AHEAD = ("run.min_clients", "run.repeats", "dataset.path")
"""Those that change no outcome of the rounds that were done, as each had enough clients, but of those to come.

A dataset's folder may be moved.
"""


_IMPLIED: dict[str, Any] = {
    f"encoder.{direction}.{key}": value
    for direction in ("broadcast", "upload")
    for key, value in (("error_feedback", False), ("rules", []))
}
"""What a run was made with whose configuration, of an earlier version, does not say so."""


def differences(there: Node, here: Node, going_on: bool = True) -> list[str]:
    """Returns in words how the plain configuration of an earlier run differs from this one's; none in the same run.

    going_on: whether this one has rounds left to do.
    """
    neutral = _NEUTRAL + _AHEAD if going_on else _NEUTRAL
    a, b = (_IMPLIED | dict(flat(config)) for config in (there, here))
    return [
        f"{key} was {a.get(key, 'absent')}, not {b.get(key, 'absent')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key not in neutral
    ]


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields path and value of every leaf of a plain configuration; a list of plain values is one leaf."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(value, dict | list) for value in node):
        for i, value in enumerate(node):
            yield from flat(value, f"{path}[{i}]")
    else:
        yield path, node


def overridden(overrides: Iterable[str]) -> set[str]:
    """Returns the keys that a command line's overrides set, add or delete, and the groups of which they choose."""
    return {override.split("=")[0].lstrip("+~") for override in overrides}


def explain(error: Exception) -> str:
    """Returns in one line what Hydra or OmegaConf found wrong with the command line or a YAML file."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    parent = getattr(cause, "parent_node", None)
    text = " ".join(line.strip() for line in str(error).split("\nConfig search path")[0].splitlines() if line.strip())
    if key and isinstance(parent, DictConfig) and "not in" in str(cause).splitlines()[0]:
        there = ", ".join(sorted(map(str, parent))) or "none"
        more = f", and with +{key}=… what its class takes beside" if "_target_" in parent else ""
        return f"{key} is not a key; allowed here: {there}{more}"
    if key:
        return f"{key}: {str(cause).splitlines()[0]}"
    if re.search(r"Could not (find|load) 'hydra/(launcher|sweeper)/", text):
        return f'{text} (some come with pip install -e ".[sweep]")'
    return text


_WORDS: dict[Any, str] = {
    **{int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"},
    **{list: "a list", dict: "keys and values"},
}


def plain(cfg: DictConfig, path: str = "", resolve: bool = True) -> Any:
    """Returns the node at `path` as plain dicts and lists; the whole without a path."""
    node = OmegaConf.select(cfg, path) if path else cfg
    return OmegaConf.to_container(node, resolve=resolve, throw_on_missing=True) if OmegaConf.is_config(node) else node


def _check_is_built(cfg: DictConfig, path: str) -> None:
    """Raises ConfigError unless the node at `path` says what it is an object of."""
    node = plain(cfg, path)
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{path}._target_ is missing")


def _check_targets(cfg: DictConfig, path: str) -> None:
    """Checks every node with a `_target_` at or below `path` against what it targets."""
    node = plain(cfg, path)
    if isinstance(node, dict):
        if "_target_" in node:
            try:
                target = pkgutil.resolve_name(node["_target_"])
            except (ImportError, AttributeError, ValueError, TypeError) as error:
                raise ConfigError(f"{path}._target_: {node['_target_']!r} cannot be imported: {error}") from error
            if not callable(target):
                raise ConfigError(f"{path}._target_: {node['_target_']!r} is no class or function")
            _check_arguments(cfg, path, target)
        children = [(f"{path}.{key}", value) for key, value in node.items()]
    else:
        children = [(f"{path}[{i}]", value) for i, value in enumerate(node)]
    for child, value in children:
        if isinstance(value, dict | list):
            _check_targets(cfg, child)


def _check_arguments(cfg: DictConfig, path: str, target: Any, knobs: set[str] | None = None) -> None:
    """Checks the keys and values of the node at `path` against the signature of `target`.

    `knobs` are keys that it may have beside, to be referred to.
    """
    node = plain(cfg, path)
    if not isinstance(node, dict):
        raise ConfigError(f"{path}: {node!r} is not allowed; it must be keys and values")
    given = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    parameters = inspect.signature(target).parameters
    try:
        hints = typing.get_type_hints(target.__dict__.get("__init__", target) if isinstance(target, type) else target)
    except NameError:  # a name that is imported for type checkers alone
        hints = {}
    for name, parameter in parameters.items():
        # what is built with `_target_` may get more arguments from the code
        if "_target_" not in node and name not in given and parameter.default is parameter.empty:
            raise ConfigError(f"{path}.{name} is missing")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in given.items():
        place = _origin(cfg, f"{path}.{key}")
        if key not in parameters:
            if takes_any or key in (knobs or ()):
                continue
            others = ", and keys that a ${…} refers to" if knobs is not None else ""
            raise ConfigError(f"{path}.{key} is not a key; allowed here: {', '.join(parameters)}{others}")
        allowed = hints.get(key, Any)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{place}: {value} is not a finite number")
        if not _fits(value, allowed):
            # run.faults=some is meant for a choice of the group run/faults
            of_group = path == "run" and isinstance(value, str) and not _fits("", allowed) and _fits({}, allowed)
            hint = f"; {path}/{key}={value} chooses a file of the group" if of_group else ""
            raise ConfigError(f"{place}: {value!r} is not allowed; it must be {_name(allowed)}{hint}")


def _knobs(cfg: DictConfig, path: str, given: set[str]) -> set[str]:
    """Returns the keys of the encoder's node at `path` that have a use: an interpolation names them.

    Or one named them before something else was replaced: on the command line, which sets the keys `given`, or in a file
    that changes another. A key that is itself given must have its use: it would be set in vain.
    """
    used = _referred_to(plain(cfg, "encoder", resolve=False), "encoder")
    names = {name.rpartition(".")[2] for name in used}
    replaced = any(name.startswith("encoder.") for name in given)

    def has_a_use(key: str) -> bool:
        whole = f"{path}.{key}"
        return whole in used or (whole not in given and (replaced or key in names))

    return set(filter(has_a_use, plain(cfg, path) or ()))


def _referred_to(node: Any, path: str, holder: str = "") -> set[str]:
    """Returns the paths that interpolations, such as ${encoder.bits}, at or below the node at `path` name."""
    if isinstance(node, dict):
        return set().union(*(_referred_to(value, f"{path}.{key}", path) for key, value in node.items()))
    if isinstance(node, list):
        return set().union(*(_referred_to(value, f"{path}[{i}]", path) for i, value in enumerate(node)))
    return {_target(holder, name) for name in re.findall(r"\$\{([\w.]+)\}", node)} if isinstance(node, str) else set()


def _target(holder: str, name: str) -> str:
    """Returns the path that the interpolation ${name} means in the node at `holder`."""
    target = name.lstrip(".")
    for _ in range(len(name) - len(target) - 1):  # each dot beyond the first is a step up
        holder = re.sub(r"(\.\w+|\[[^\]]*\])$", "", holder)
    return f"{holder}.{target}" if name.startswith(".") else target


def _origin(cfg: DictConfig, path: str) -> str:
    """Returns where the value at `path` was written: an interpolation such as ${encoder.bits} is followed."""
    holder, _, key = path.rpartition(".")
    written = plain(cfg, holder, resolve=False)[key]
    if not (isinstance(written, str) and re.fullmatch(r"\$\{[\w.]+\}", written)):
        return path
    return _origin(cfg, _target(holder, written[2:-1]))


def _fits(value: Any, allowed: Any) -> bool:
    """Tells whether `value`, as read from YAML, is of an annotated type; types that YAML cannot hold always fit."""
    origin = typing.get_origin(allowed)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in _options(allowed))
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
    if origin is tuple and ... not in typing.get_args(allowed):  # YAML has lists
        members = typing.get_args(allowed)
        return isinstance(value, list) and len(value) == len(members) and all(map(_fits, value, members))
    return True


def _options(union: Any) -> list[Any]:
    """Returns the members of a union that YAML can hold, all if there are none such."""
    members = list(typing.get_args(union))
    return [m for m in members if m in _WORDS or typing.get_origin(m) in (Literal, list, dict)] or members


def _name(allowed: Any) -> str:
    """Returns an annotated type in words."""
    origin = typing.get_origin(allowed)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(option) for option in _options(allowed))
    if origin is Literal:
        return " or ".join(map(str, typing.get_args(allowed)))
    if origin is tuple:
        return f"a list of {', '.join(map(_name, typing.get_args(allowed)))}"
    return _WORDS.get(origin or allowed, str(allowed))


def _call(path: str, function: Any) -> Any:
    """Calls a constructor; what it refuses becomes a ConfigError that names the group."""
    try:
        return function()
    except (HydraException, TypeError, ValueError, LookupError) as error:
        cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
        if isinstance(cause, TypeError | ValueError | LookupError):
            raise ConfigError(f"{path}: {cause}") from error
        raise cause from error
