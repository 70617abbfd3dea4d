"""The format is frozen: messages equal the messages in golden/, and decode to the values in golden/.

If a message changes, the format needs a new version number in fedq/encoding/message.py. Only then, or for a new
encoder, write the files anew:

    FEDQ_WRITE_GOLDEN=1 python -m pytest tests/encoding/test_golden.py

and read the difference before you commit it. Values are JSON numbers, which hold every float64 exactly.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedq.encoding import (
    ANS,
    CABAC,
    QSGD,
    Cast,
    ClipByValue,
    Codec,
    Elias,
    Encoder,
    FixedWidth,
    FollowLoss,
    Golomb,
    Huffman,
    Key,
    NaturalCompression,
    OneBitTwoMeans,
    RandomMask,
    RandomSubspace,
    ScaledSign,
    StateDictEncoder,
    StepQuantization,
    TernGrad,
    ThreeLevel,
    Threshold,
    TopK,
    TrellisQuantization,
    UniformQuantization,
    ZeroRuns,
    schema_of,
)
from fedq.encoding.testing import raw_bytes

FOLDER = Path(__file__).parent / "golden"
KEY = Key(seed=20_161_018, round=3, client=1_000)
LARGE = ["1e6d8a883df0fef3", "1390f0f0f60a315b", "8f9d4dac7b5c404f", "63698d78c2d6ded7"]

ENCODERS = {
    "float32": StateDictEncoder(),
    **{
        f"uniform{bits}_nearest": StateDictEncoder(Encoder([UniformQuantization(bits, "nearest")], FixedWidth()), 100)
        for bits in (1, 3, 8, 12)
    },
    "uniform8_stochastic": StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), 100),
    # one encoder for each use of the key, and for each format of indices and entropy coders. None has a sum or a
    # product of matrices, because their last bits depend on the processor
    "uniform4_dithered": StateDictEncoder(Encoder([UniformQuantization(4, "dithered")], FixedWidth()), 100),
    "random_mask": StateDictEncoder(Encoder([RandomMask(0.3)]), 100),
    "random_mask_shared": StateDictEncoder(Encoder([RandomMask(0.3, shared=True)]), 100),
    "random_subspace": StateDictEncoder(Encoder([RandomSubspace(3)]), 100),
    "terngrad": StateDictEncoder(Encoder([TernGrad()], ZeroRuns()), 100),
    "qsgd": StateDictEncoder(Encoder([QSGD(4, 16, "max")], FixedWidth()), 100),
    "natural": StateDictEncoder(Encoder([NaturalCompression()], FixedWidth()), 100),
    "top_k": StateDictEncoder(Encoder([TopK(0.1)]), 100),
    "float8": StateDictEncoder(Encoder([Cast("float8_e4m3fn", scale=True)]), 100),
    "golomb": StateDictEncoder(Encoder([StepQuantization(0.25, relative=False)], Golomb()), 100),
    "elias": StateDictEncoder(Encoder([StepQuantization(0.25, relative=False)], Elias("delta")), 100),
    "ans": StateDictEncoder(Encoder([UniformQuantization(8, "nearest")], ANS()), 100),
    "ans_of_steps": StateDictEncoder(Encoder([StepQuantization(0.25, relative=False)], ANS("laplace")), 100),
    "trellis": StateDictEncoder(
        Encoder([TrellisQuantization(0.25, relative=False, rate_weight=0)], CABAC(signed=False)), 100
    ),
    "ans_adaptive": StateDictEncoder(Encoder([UniformQuantization(8, "nearest")], ANS("adaptive")), 100),
    "cabac": StateDictEncoder(Encoder([StepQuantization(0.25, relative=False)], CABAC()), 100),
    "cabac_of_levels": StateDictEncoder(Encoder([UniformQuantization(8, "nearest")], CABAC()), 100),
    "rates": StateDictEncoder(Encoder([StepQuantization(0.25, relative=False, rate_weight=2.0)], CABAC()), 100),
    "common_scale": StateDictEncoder(
        Encoder([StepQuantization(0.25, relative=False)], CABAC()), 100, common_scale=True
    ),
    "huffman": StateDictEncoder(Encoder([UniformQuantization(8, "nearest")], Huffman()), 100),
    # these sums are exact, because all elements are multiples of a sixteenth
    "scaled_sign": StateDictEncoder(Encoder([ScaledSign()], FixedWidth()), 100),
    "two_means": StateDictEncoder(Encoder([OneBitTwoMeans()], FixedWidth()), 100),
    "threshold": StateDictEncoder(Encoder([Threshold(2.0, relative=False)]), 100),
    "clipped": StateDictEncoder(Encoder([ClipByValue(1.5)]), 100),
    "three_level": StateDictEncoder(Encoder([ThreeLevel(1.5)], ZeroRuns()), 100),
    "joint": StateDictEncoder(Encoder([TopK(0.1)]), 100, {"[dhc]*": Encoder()}, joint=True),
    "reference": StateDictEncoder(Encoder([StepQuantization(0.25, relative=False)], CABAC()), 100, reference="initial"),
    "attached": StateDictEncoder(
        Encoder([StepQuantization(0.25, relative=False)], CABAC()), 100, common_scale=True, rate_control=FollowLoss(8.0)
    ),
}


def tensors() -> dict[str, torch.Tensor]:
    """Returns tensors from integer arithmetic: exact in every dtype, on every machine."""

    def numbers(n: int, dtype: torch.dtype) -> torch.Tensor:
        return ((torch.arange(n) * 37 % 101 - 40).to(dtype)) / 16

    return {
        "layer.weight": numbers(132, torch.float32).reshape(12, 11),
        "layer.bias": numbers(12, torch.float32),
        "double": numbers(101, torch.float64),
        "half": numbers(105, torch.float16),
        "brain": numbers(5, torch.bfloat16),
        "steps": torch.tensor(2**40 + 1),
        "mask": torch.arange(9) % 2 == 0,
        "bytes": torch.tensor([0, 127, 255], dtype=torch.uint8),
        "nothing": torch.zeros(0, 3),
        "constant": torch.full((101,), -2.5),
    }


def bound(name: str, given: dict[str, torch.Tensor]) -> tuple[Codec, dict[str, Any], dict[str, Any]]:
    """Returns the codec, and the other arguments of its `encode` and `decode`."""
    codec = ENCODERS[name].bind(schema_of(given))
    if name == "reference":
        both = {"reference": {key: torch.ones_like(value) for key, value in given.items()}}
        return codec, both, both
    if name == "attached":
        params = codec.adaptation.params(codec.adaptation.initial_state())
        codec = ENCODERS[name].bind(schema_of(given), attached=codec.adaptation.params_schema, reports=True)
        return codec, {"params": params, "attached": params, "loss": 1.5}, {}
    return codec, {}, {}


@pytest.mark.parametrize("name", ENCODERS)
def test_golden(name: str) -> None:
    given = tensors()
    codec, sending, receiving = bound(name, given)
    message, _ = codec.encode(given, KEY, **sending)
    binary, values = FOLDER / f"{name}.bin", FOLDER / f"{name}.json"
    if os.environ.get("FEDQ_WRITE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        binary.write_bytes(message)
        decoded, _ = codec.decode(message, KEY, **receiving)
        lists = {key: value.flatten().tolist() for key, value in decoded.items()}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in lists.items()]
        values.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    golden = binary.read_bytes()
    assert len(golden) < 4096
    assert message == golden
    decoded, _ = codec.decode(golden, KEY, **receiving)
    stored = json.loads(values.read_text())
    assert list(decoded) == list(stored)
    for key, tensor in given.items():
        expected = torch.tensor(stored[key], dtype=tensor.dtype).reshape(tensor.shape)
        assert raw_bytes(decoded[key]) == raw_bytes(expected), key


def test_all_golden_files_are_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{n}.{end}" for n in ENCODERS for end in ("bin", "json")}


def test_golden_hash_of_a_large_tensor() -> None:
    # larger than a piece that a stage works on: the random numbers must not depend on the pieces
    x = {"x": (torch.arange(300_001) * 7919 % 65_537 - 30_000).float() / 1024}
    digests = []
    for bits, rounding in ((8, "stochastic"), (12, "stochastic"), (16, "stochastic"), (5, "nearest")):
        codec = StateDictEncoder(Encoder([UniformQuantization(bits, rounding)], FixedWidth())).bind(schema_of(x))
        message, _ = codec.encode(x, KEY)
        back, _ = codec.decode(message, KEY)
        digests.append(hashlib.sha256(message + raw_bytes(back["x"])).hexdigest()[:16])
    assert digests == LARGE
