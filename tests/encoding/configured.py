"""Reads the encoders of conf/encoder without Hydra, which would take seconds in each of pytest's workers."""

import functools
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from fedq.config import build_encoder
from fedq.encoding import StateDictEncoder

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(file.stem for file in (CONF / "encoder").glob("*.yaml"))
DIRECTIONS: tuple[Literal["broadcast"], Literal["upload"]] = ("broadcast", "upload")


def node(name: str) -> DictConfig:
    """Returns a file of conf/encoder, on top of the files that its `defaults` name."""
    own = OmegaConf.load(CONF / "encoder" / f"{name}.yaml")
    others = [other for other in own.pop("defaults", []) if other != "_self_"]
    return OmegaConf.merge(*map(node, others), own)


@functools.cache
def config(name: str) -> DictConfig:
    """Returns the part of a composed configuration that describes an encoder."""
    return OmegaConf.create({"encoder": OmegaConf.merge(OmegaConf.load(CONF / "config.yaml").encoder, node(name))})


def built(name: str, direction: Literal["broadcast", "upload"]) -> StateDictEncoder:
    """Returns the encoder of one direction of a file."""
    encoder: StateDictEncoder = build_encoder(config(name), direction)
    return encoder
