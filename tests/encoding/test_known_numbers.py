"""Checks numbers that theory or counting gives: from rate-distortion theory, and from numbers of parameters."""

import pytest
import torch

from fedq.encoding import (
    Encoder,
    FixedWidth,
    Key,
    MessageError,
    StateDictEncoder,
    TensorSpec,
    UniformQuantization,
    schema_of,
)
from fedq.models.fedavg_cnn import FedAvgCNN

KEY = Key(5)
UINT8 = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()))


def sent(encoder: StateDictEncoder, tensors: dict[str, torch.Tensor]) -> bytes:
    return encoder.bind(schema_of(tensors)).encode(tensors, KEY).message


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.from_numpy(Key(0).fold("noise").generator().random(400_000)).float()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return FedAvgCNN(10).state_dict()


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8, 10, 12])
@pytest.mark.parametrize(("rounding", "divisor", "within"), [("nearest", 12, 0.01), ("stochastic", 6, 0.02)])
def test_squared_error(noise: torch.Tensor, bits: int, rounding: str, divisor: int, within: float) -> None:
    stage = UniformQuantization(bits, rounding)
    y, side = stage.encode(noise, KEY)
    error = noise.double() - stage.decode(y, side, TensorSpec.of(noise), KEY).double()
    step = float(side["maximum"] - side["minimum"]) / (2**bits - 1)
    assert float((error**2).mean()) == pytest.approx(step**2 / divisor, rel=within)
    assert abs(float(error.mean())) < 4 * step / (divisor * len(noise)) ** 0.5


def test_squared_error_at_16_bits(noise: torch.Tensor) -> None:
    # float64, because float32 noise has as few as 8 bits below the step
    x = noise.double() + 2.0**-25
    for rounding, divisor in (("nearest", 12), ("stochastic", 6)):
        stage = UniformQuantization(16, rounding)
        y, side = stage.encode(x, KEY)
        step = float(side["maximum"] - side["minimum"]) / (2**16 - 1)
        error = x - stage.decode(y, side, TensorSpec.of(x), KEY)
        assert float((error**2).mean()) == pytest.approx(step**2 / divisor, rel=0.02)


def test_uint8_message_of_the_cnn(weights: dict[str, torch.Tensor]) -> None:
    assert sum(tensor.numel() for tensor in weights.values()) == 1_663_370
    bits = 8 * len(sent(UINT8, weights))
    quantised, exact = 51_200 + 1_605_632, 1_663_370 - 51_200 - 1_605_632
    assert bits == 8 * quantised + 32 * exact + 2 * 8 * 8 + 8 * 48 == 13_463_872 + 2 * 64 + 384
    assert bits <= 13_463_872 + 8 * (64 + 2 * 16)
    assert 10 * bits / 2**20 <= 128.42


def test_float32_message_of_the_cnn(weights: dict[str, torch.Tensor]) -> None:
    bits = 8 * len(sent(StateDictEncoder(), weights))
    assert bits == 32 * 1_663_370 + 8 * 48 == 53_227_840 + 384
    assert f"{10 * bits / 2**20:.2f}" == "507.62"


def test_exactly_the_two_large_tensors_are_quantised(weights: dict[str, torch.Tensor]) -> None:
    back, _ = UINT8.bind(schema_of(weights)).decode(sent(UINT8, weights), KEY)
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, back[name])}
    assert changed == {name for name, tensor in weights.items() if tensor.numel() > 10_000}
    assert sorted(weights[name].numel() for name in changed) == [51_200, 1_605_632]


@pytest.mark.parametrize("threshold", [0, 1, 99, 10_000])
def test_strictly_more_than_the_threshold(threshold: int) -> None:
    encoder = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), threshold=threshold)
    at, above = torch.linspace(0, 1, threshold), torch.linspace(0, 1, threshold + 1)
    assert len(sent(encoder, {"x": at})) == 48 + 4 * threshold
    assert len(sent(encoder, {"x": above})) == 48 + 8 + threshold + 1
    back, _ = encoder.bind(schema_of({"x": at})).decode(sent(encoder, {"x": at}), KEY)
    assert torch.equal(back["x"], at)


def test_the_threshold_is_10_000_and_not_negative() -> None:
    assert StateDictEncoder().threshold == 10_000
    with pytest.raises(ValueError, match="threshold"):
        StateDictEncoder(threshold=-1)
    with pytest.raises(MessageError, match="schema"):  # one element more selects another chain, so the schema differs
        UINT8.bind({"x": TensorSpec((10_001,), torch.float32)}).decode(sent(UINT8, {"x": torch.zeros(10_000)}), KEY)
