"""Builds the objects that a configuration describes.

A node with a `_target_` names a class and its arguments. The constructor's parameters are the
allowed keys, and the annotations give the types. A new dataset, model, stage or optimizer needs only a YAML file. The
groups `run` and `encoder` have no `_target_`: the dataclasses of config_nodes.py describe them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hydra.utils import instantiate
from omegaconf import DictConfig

from fedq.config_check import (
    DIRECTIONS,
    call_or_config_error,
    check_arguments,
    check_is_built,
    check_targets,
    moved,
    overridden,
    references,
    takes,
)
from fedq.config_check import ConfigError as ConfigError
from fedq.config_check import explain as explain
from fedq.config_check import to_container as to_container
from fedq.config_nodes import DirectionConfig, EncoderConfig, RuleConfig, RunConfig

if TYPE_CHECKING:
    from fedq.encoding import Coder
    from fedq.learning.error_feedback import Direction


_GROUPS = ("dataset", "model", "task", "algorithm", "client", "server", "run")
"""The groups of a configuration, except `encoder`."""

_OPTIONS = ("joint", "reference", "common_scale")
"""Keys of a direction that are arguments of StateDictEncoder."""

NO_CODER = (None, {"_target_": None})
"""Values of `coder` that select the coder that fits the last stage."""

_PARTIAL = {"client": ("client.optimizer", "client.schedule"), "server": ("server.schedule",)}
"""Parts of a group that may be null. fedq passes the first argument."""

_REQUIRED = {
    "dataset": ("num_classes", "num_clients", "client", "test"),
    "task": ("loss", "metrics", "headline", "more_is_better", "reported"),
    "algorithm": ("groups", "weigh", "step"),
    "client": ("train", "structured"),
    "run.faults": ("client", "uplink"),
    "run.guard": ("scale", "update"),
    "run.submodel": ("keep",),
    "run.network": ("link", "deadline", "over_selection"),
}
"""Attributes that the object of each part must have."""


def check(cfg: DictConfig, overrides: Iterable[str] = ()) -> None:
    """Raises ConfigError unless every key of a composed configuration is known and has a value of the right type.

    overrides: Overrides of the command line. Each key that they set must have an effect.
    """
    given = overridden(overrides)
    if unknown := sorted(map(str, cfg.keys() - {*_GROUPS, "encoder", "hydra"})):
        raise ConfigError(f"{unknown[0]} is not a key; allowed here: {', '.join((*_GROUPS, 'encoder'))}")
    for key in given:  # first, so that an error names the key that the command line set
        to_container(cfg, key if key.partition(".")[0] in (*_GROUPS, "encoder") else "run")
    floor = build_run(cfg).accuracy_floor
    for group in _GROUPS:
        if group != "run":
            check_is_built(cfg, group)
            partial = group in ("model", "server")
            if to_container(cfg, group).get("_partial_", False) is not partial:
                optimizer = "; an optimizer's class is client.optimizer, as in client/adamw.yaml"
                hint = optimizer if group == "client" else ""
                raise ConfigError(f"{group}._partial_ must be {str(partial).lower()}{hint}")
        for part in _PARTIAL.get(group, ()):
            node = to_container(cfg, part)
            if node is not None and not (isinstance(node, dict) and node.get("_target_") and node.get("_partial_")):
                raise ConfigError(f"{part} must be null, or a node with _target_ and _partial_: true")
        if group == "model" and "num_classes" in to_container(cfg, group):
            raise ConfigError("model.num_classes is not a key: the dataset gives the number")
        check_targets(cfg, group)
    if floor is not None and not 0 <= floor <= 1 and build(cfg, "task").more_is_better:
        raise ConfigError(f"run: accuracy_floor must be from 0 to 1, not {floor}")
    for name in ("faults", "guard", "submodel", "network"):
        if to_container(cfg, f"run.{name}") is not None:
            check_is_built(cfg, f"run.{name}")
    check_arguments(cfg, "encoder", EncoderConfig, _knobs(cfg, "encoder", given))
    for direction in (f"encoder.{name}" for name in DIRECTIONS):
        check_arguments(cfg, direction, DirectionConfig, _knobs(cfg, direction, given))
        if to_container(cfg, direction).get("rate_control") is not None:
            check_is_built(cfg, f"{direction}.rate_control")
        rules = [f"{direction}.rules[{i}]" for i in range(len(to_container(cfg, direction).get("rules", [])))]
        for rule in rules:
            check_arguments(cfg, rule, RuleConfig)
        patterns = [to_container(cfg, rule)["pattern"] for rule in rules]
        if twice := {pattern for pattern in patterns if patterns.count(pattern) > 1}:
            raise ConfigError(f"{direction}.rules: {min(twice)!r} is there twice; the first that matches counts")
        for chain in (direction, *rules):
            for i in range(len(to_container(cfg, chain)["stages"])):
                check_is_built(cfg, f"{chain}.stages[{i}]")
            if to_container(cfg, chain).get("coder") not in NO_CODER:
                check_is_built(cfg, f"{chain}.coder")
        check_targets(cfg, direction)


def _knobs(cfg: DictConfig, path: str, given: set[str]) -> set[str]:
    """Returns the keys of the encoder's node at `path` that are allowed because a ${…} refers to them.

    A key also counts if a ${…} referred to it before the command line or another file replaced the ${…}.
    Raises ConfigError for a key of an earlier version, with the sentence of `moved`.
    given: The keys that the command line sets. A ${…} must refer to each of them.
    """
    encoder, node = to_container(cfg, "encoder", resolve=False), to_container(cfg, path) or {}
    used = references(encoder, "encoder")
    names = {name.rpartition(".")[2] for name in used}
    replaced = any(name.startswith("encoder.") for name in given)
    knobs = set()
    for key in node:
        full = f"{path}.{key}"
        sides = [f"encoder.{side}" for side in DIRECTIONS if path == "encoder" and key in (encoder.get(side) or ())]
        if full not in used and len(sides) == 1 and not given & {*sides, f"{sides[0]}.{key}"}:
            raise ConfigError(moved(full, encoder))
        if full in used or (full not in given and (replaced or key in names)):
            knobs.add(key)
    return knobs


def build_run(cfg: DictConfig) -> RunConfig:
    """Returns the checked group `run`."""
    check_arguments(cfg, "run", RunConfig)
    run: RunConfig = call_or_config_error("run", lambda: RunConfig(**to_container(cfg, "run")))
    return run


def build(cfg: DictConfig, path: str, **arguments: Any) -> Any:
    """Builds the object of the `_target_` in the node at `path`, such as "dataset".

    arguments: Further arguments of the constructor. num_classes is left out if a model does not take this argument.
    Raises ConfigError if the constructor refuses an argument, or if the object lacks attributes that `path` needs.
    """
    given = {name: value for name, value in arguments.items() if path != "model" or takes(cfg.model._target_, name)}
    # Constructors receive plain containers, never objects of OmegaConf.
    node = to_container(cfg, path)
    if path == "server":
        node.pop("schedule", None)
    part = call_or_config_error(path, lambda: instantiate(node, **given, _convert_="all"))
    if lacking := [name for name in _REQUIRED.get(path, ()) if not hasattr(part, name)]:
        raise ConfigError(f"{path}: a {type(part).__name__} has no {', '.join(lacking)}")
    return partial(_module, part) if path == "model" else part


def _module(build_model: Callable[[], Any]) -> Any:
    """Returns the model. Raises ConfigError if its constructor refuses an argument, or if it is not an nn.Module."""
    import torch

    if not isinstance(module := call_or_config_error("model", build_model), torch.nn.Module):
        raise ConfigError(f"model: a {type(module).__name__} is not a torch.nn.Module")
    return module


def build_protocol(cfg: DictConfig, dataset: Any, device: Any) -> dict[str, Any]:
    """Returns the arguments of `fedq.learning.protocol.Protocol`, on which both halves of a round must agree."""
    from fedq.data.dataset import plain_integer

    num_classes = plain_integer("dataset.num_classes", getattr(dataset, "num_classes", None), 1, 2**63)
    return {
        "model": build(cfg, "model", num_classes=num_classes),
        "task": build(cfg, "task"),
        "client": build(cfg, "client"),
        "broadcast": build_encoder(cfg, "broadcast"),
        "upload": build_encoder(cfg, "upload"),
        "algorithm": build(cfg, "algorithm"),
        "submodel": build(cfg, "run.submodel") if to_container(cfg, "run.submodel") else None,
        "seed": build_run(cfg).seed,
        "device": device,
    }


def build_server(cfg: DictConfig) -> Any:
    """Returns a function that makes the server optimizer. A trial step checks its arguments before the first round."""
    import torch

    from fedq.learning.optimizers import Scheduled

    server = build(cfg, "server")

    def try_once() -> None:
        parameter = torch.zeros(1, requires_grad=True)
        parameter.grad = torch.zeros(1)
        try:
            server([parameter]).step()
        except (AttributeError, RuntimeError) as error:  # not an optimizer, or an optimizer for sparse gradients
            raise ValueError(error) from error

    call_or_config_error("server", try_once)
    if to_container(cfg, "server.schedule") is None:
        return server
    scheduled = Scheduled(server, build(cfg, "server.schedule"))
    scheduled.rate(1)
    return scheduled


def build_encoder(cfg: DictConfig, direction: Literal["broadcast", "upload"]) -> "Direction":
    """Returns the encoder of one direction: a StateDictEncoder, with error feedback or without."""
    from fedq.encoding import Encoder, StateDictEncoder
    from fedq.learning import ErrorFeedback

    def chain(path: str) -> Encoder:
        stages = [build(cfg, f"{path}.stages[{i}]") for i in range(len(to_container(cfg, f"{path}.stages")))]
        encoder: Encoder = call_or_config_error(path, lambda: Encoder(stages))
        given = to_container(cfg, path).get("coder") not in NO_CODER
        coder = build(cfg, f"{path}.coder") if given else coder_that_fits(stages, path)
        encoder = call_or_config_error(path, lambda: replace(encoder, coder=coder))
        return encoder

    path = f"encoder.{direction}"
    node, threshold = to_container(cfg, path), to_container(cfg, "encoder")["threshold"]
    rules = {rule["pattern"]: chain(f"{path}.rules[{i}]") for i, rule in enumerate(node.get("rules", []))}
    options = {name: node[name] for name in _OPTIONS if name in node}
    if node.get("rate_control"):
        options["rate_control"] = build(cfg, f"{path}.rate_control")
    main = chain(path)
    encoder: StateDictEncoder = call_or_config_error(
        "encoder", lambda: StateDictEncoder(main, threshold, rules, **options)
    )
    if not node.get("error_feedback"):
        return encoder
    feedback: Direction = call_or_config_error("encoder", lambda: ErrorFeedback(encoder))
    return feedback


def coder_that_fits(stages: Sequence[Any], path: str) -> "Coder":
    """Returns FixedWidth if the last stage gives symbols of a known number of levels, else Raw.

    The function encodes four numbers to find out. Raises ConfigError if the stages fail on them.
    """
    import torch

    from fedq.encoding import AdaptiveEncodingStage, FixedWidth, Key, Raw, TensorSpec

    x = torch.linspace(-1, 1, 4)
    first = spec = TensorSpec.of(x)
    try:
        for stage in stages:
            params = [stage.params(stage.initial_state(first))] if isinstance(stage, AdaptiveEncodingStage) else []
            x, side, *_ = stage.encode(x, Key(0), *params)
            spec = stage.encoded_spec(spec, side)
    except Exception as error:
        raise ConfigError(f"{path}.coder must be given, as the stages fail on four numbers: {error}") from error
    return Raw() if spec.levels is None else FixedWidth()


CHANGES_NOTHING = tuple(
    f"run.{name}" for name in ("checkpoint_every", "keep", "resume", "workers", "accuracy_floor", "residual_memory")
)
"""Keys that change no result."""


def flatten(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields path and value of every leaf of a plain configuration. A list of values is one leaf."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(value, dict | list) for value in node):
        for i, value in enumerate(node):
            yield from flatten(value, f"{path}[{i}]")
    else:
        yield path, node
