"""The text of the fingerprints is frozen: each encoder of conf/encoder has the text in canonical_text.json.

Renaming a class or a field changes this text and the format, unless `canonical_name` keeps the old name. Only for a
new or changed file of conf/encoder, write the texts anew:

    FEDQ_WRITE_GOLDEN=1 python -m pytest tests/encoding/test_canonical_text.py

and read the difference before you commit it.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from configured import DIRECTIONS, NAMES, built
from torch import Tensor

from fedq.encoding import Encoder, EncodingStage, FixedWidth, Key, StateDictEncoder, TensorSpec
from fedq.encoding.schema import canonical_text

FILE = Path(__file__).parent / "canonical_text.json"
SCHEMA = {
    "conv.weight": TensorSpec((64, 32, 5, 5), torch.float32),
    "conv.bias": TensorSpec((64,), torch.float32),
    "dense.weight": TensorSpec((512, 3136), torch.float32),
    "steps": TensorSpec((), torch.int64),
}


def texts(name: str, direction: Literal["broadcast", "upload"]) -> dict[str, str]:
    """Returns the texts of all chains, and the fingerprint of a codec that sends params and reports."""
    encoder = built(name, direction)
    chains = {"*": encoder.encoder, **encoder.rules}
    params = encoder.bind(SCHEMA).adaptation.params_schema
    codec = encoder.bind(SCHEMA, attached=params, reports=True)
    fingerprint = codec.fingerprint(
        {part: torch.zeros(SCHEMA[part].shape) for part in codec.compressed} if codec.sends_differences else {}
    )
    return {pattern: canonical_text(chain) for pattern, chain in chains.items()} | {"fingerprint": fingerprint.hex()}


def test_the_texts_of_all_configured_chains() -> None:
    found = {f"{name} {direction}": texts(name, direction) for name in NAMES for direction in DIRECTIONS}
    if os.environ.get("FEDQ_WRITE_GOLDEN"):
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(FILE.read_text())


# --------------------------------------------------------------------------------------------- canonical_name


@dataclass(frozen=True)
class Original(EncodingStage):
    steps: int = 1
    weight: float = 0.5

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x.clone(), {}

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y.clone()


@dataclass(frozen=True)
class Renamed(EncodingStage):
    canonical_name: ClassVar[str] = "Original"

    number_of_steps: int = dataclasses.field(default=1, metadata={"canonical_name": "steps"})
    weight: float = 0.5

    encode = Original.encode
    decode = Original.decode


@dataclass(frozen=True)
class Careless(EncodingStage):
    """A renamed class without canonical_name."""

    steps: int = 1
    weight: float = 0.5

    encode = Original.encode
    decode = Original.decode


def fingerprint(stage: EncodingStage) -> bytes:
    return StateDictEncoder(Encoder([stage], FixedWidth())).bind(SCHEMA).fingerprint({})


@pytest.mark.parametrize(("steps", "weight"), [(1, 0.5), (7, 0.5), (1, 2), (7, 2.0)])
def test_a_renamed_class_or_field_keeps_its_fingerprint(steps: int, weight: float) -> None:
    original = Original(steps, weight)
    assert canonical_text(Renamed(steps, weight)) == canonical_text(original)
    assert fingerprint(Renamed(steps, weight)) == fingerprint(original)
    assert fingerprint(Careless(steps, weight)) != fingerprint(original)
    assert fingerprint(Renamed(steps + 1, weight)) != fingerprint(original)


def test_the_text_in_full() -> None:
    assert canonical_text(Encoder([Renamed(7, 2)], FixedWidth())) == (
        "Encoder(stages=[Original(steps=7, weight=2.0)], coder=FixedWidth())"
    )
    assert canonical_text(TensorSpec.symbols((3, 4), 5)) == "TensorSpec(shape=[3, 4], dtype=torch.uint8, levels=5)"


def test_a_subclass_has_a_name_of_its_own() -> None:
    class Finer(Renamed):
        pass

    assert canonical_text(Finer(7)) == "Finer(steps=7)"
    assert fingerprint(Finer()) != fingerprint(Renamed())
