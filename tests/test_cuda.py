"""Encoders, rounds and the command line on a GPU, and the error without a GPU."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from command import fedq
from test_config import configured, options
from test_train import SMALL, metrics_of, weights_of
from torch import Tensor

from fedq.config import build, build_encoder
from fedq.encoding import (
    ANS,
    QSGD,
    AdaptiveQuantileClip,
    Cast,
    ClipByValue,
    Encoder,
    Key,
    Logarithmic,
    NaturalCompression,
    NormalFloat,
    PowerSGD,
    RandomMask,
    StateDictEncoder,
    ThreeLevel,
    TopK,
    UniformQuantization,
    ZeroOutliers,
    schema_of,
)
from fedq.encoding.testing import raw_bytes
from fedq.learning import ErrorFeedback, FederatedAveraging, LocalTraining
from fedq.learning.guard import NormGuard
from fedq.models import MLP
from fedq.simulation import checkpoint

DEVICE = "cuda"
KEY = Key(seed=3, round=2, client=1)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")

# Stages without sums and products of matrices, whose order depends on the device. QSGD uses the largest magnitude here.
FIXED = (Cast, ClipByValue, Logarithmic, NaturalCompression, NormalFloat, QSGD, RandomMask, ThreeLevel, TopK)
FIXED += (UniformQuantization, ZeroOutliers)


def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(150, 201, generator=generator) / 100,
        "convolution": torch.randn(32, 16, 5, 5, generator=generator).to(memory_format=torch.channels_last) / 100,
        "bias": torch.randn(10, generator=generator),
        "steps": torch.tensor(7),
    }


def on(device: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], share: float) -> None:
    """Checks that tensors differ by at most a `share` of their norm: a tie may be rounded the other way."""
    for name, tensor in a.items():
        x, y = tensor.cpu().double(), b[name].cpu().double()
        assert float((x - y).norm()) <= share * float(y.norm()), name


def send(encoder: StateDictEncoder, tensors: dict[str, Tensor], device: str) -> tuple[bytes, dict[str, Tensor]]:
    """Returns the message of tensors on a device, and the tensors decoded there. Reports come from the CPU."""
    codec = encoder.bind(schema_of(tensors), reports=True)
    params = codec.adaptation.params(codec.adaptation.initial_state())
    reference = {
        name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in on(device, tensors).items()
    }
    message, reports = codec.encode(on(device, tensors), KEY, params, reference=reference, loss=1.0)
    assert {report.device.type for report in reports.values()} <= {"cpu"}
    decode = partial(codec.decode, message, KEY, params, reference=reference, device=device)
    decoded, attached = decode()
    assert {report.device.type for report in attached.values()} <= {"cpu"}
    # differences cannot be summed like tensors
    partly = {} if codec.sends_differences else decode(stop_at_sum=True).tensors
    decoded = codec.decode_sum(partly, KEY, params) if partly else decoded
    assert {tensor.device.type for tensor in (partly | decoded).values()} == {device}
    assert schema_of(decoded) == codec.schema
    return message, decoded


def configured_encoder(name: str, direction: str) -> StateDictEncoder:
    built = build_encoder(configured(f"encoder={name}", "encoder.threshold=100"), direction)
    return built.encoder if isinstance(built, ErrorFeedback) else built


@gpu
@pytest.mark.parametrize("direction", ["broadcast", "upload"])
@pytest.mark.parametrize("name", options("encoder"))
def test_every_configured_chain_encodes_and_decodes_on_the_device(name, direction):
    encoder, tensors = configured_encoder(name, direction), given()
    message, decoded = send(encoder, tensors, DEVICE)
    on_cpu, decoded_on_cpu = send(encoder, tensors, "cpu")
    stages = [stage for chain in encoder.bind(schema_of(tensors)).chains.values() for stage in chain.encoder.stages]
    if all(isinstance(stage, FIXED) for stage in stages):
        assert message == on_cpu
        for key, tensor in decoded.items():
            assert raw_bytes(tensor) == raw_bytes(decoded_on_cpu[key]), key
    else:
        assert abs(len(message) - len(on_cpu)) <= 0.01 * len(on_cpu)
        assert_close(decoded, decoded_on_cpu, 0.05)


@gpu
@pytest.mark.parametrize("name", ["k_means", "product", "step", "terngrad"])
def test_denormals_are_divided_as_on_the_cpu(name):
    # CUDA would multiply by the reciprocal of a number, and the reciprocal is infinite here
    tensors = {"denormal": given()["matrix"] * 1e-38}
    encoder = configured_encoder(name, "upload")
    assert_close(send(encoder, tensors, DEVICE)[1], send(encoder, tensors, "cpu")[1], 0.05)


@gpu
@pytest.mark.parametrize(
    "chain", [Encoder([AdaptiveQuantileClip(), UniformQuantization()], ANS()), Encoder([PowerSGD()])], ids=str
)
@pytest.mark.parametrize(
    "wrap", [lambda e: e, ErrorFeedback, lambda e: replace(e, reference="last")], ids=["plain", "feedback", "last"]
)
def test_rounds_stay_on_the_device_and_go_on_from_a_checkpoint(chain, wrap, tmp_path):
    dataset = build(configured(*SMALL), "dataset")
    clients = [dataset.client(number) for number in range(3)]
    encoder, client = StateDictEncoder(chain), LocalTraining(lr=0.02, momentum=0.9, proximal=0.01, epochs=2)
    parts = (partial(MLP, 10), client, partial(torch.optim.Adam, lr=0.01), wrap(encoder), encoder)
    process, on_cpu = (FederatedAveraging(*parts, device=device, guard=NormGuard("clip")) for device in (DEVICE, "cpu"))

    first, _ = process.next(process.initialize(), clients)
    second, metrics = process.next(first, clients)
    assert metrics["clients_failed"] == 0
    loaded, _ = checkpoint.load(checkpoint.save(first, {}, tmp_path, 1))
    resumed, _ = process.next(loaded, clients)
    for state in (first, second, resumed):
        moments = [each[name] for each in state.optimizer["state"].values() for name in ("exp_avg", "exp_avg_sq")]
        assert {tensor.device.type for tensor in (*state.weights.values(), *moments)} == {DEVICE}
        learned = state.broadcast | state.upload
        assert {tensor.device.type for tensor in learned.values()} == {"cpu"}
    assert_close(resumed.weights, second.weights, 1e-3)

    test = dataset.test()
    found = process.evaluate(second, test)
    assert found == pytest.approx(process.evaluate(second, type(test)(*(part.to(DEVICE) for part in test))))
    assert found == pytest.approx(on_cpu.evaluate(second, test), rel=1e-3)


@gpu
def test_the_command_line_trains_on_the_device_and_goes_on(tmp_path):
    command = [*SMALL, "encoder=powersgd", "server=adam", "client=momentum", "run.device=cuda", "hydra.run.dir=run"]
    for rounds in (1, 2):
        fedq(tmp_path, *command, f"run.rounds={rounds}")
    assert [line["clients"] for line in metrics_of(tmp_path / "run")] == [3, 3]
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run").values())


@gpus
def test_two_ranks_have_a_device_each(tmp_path):
    command = [*SMALL, "encoder=powersgd", "run.device=cuda"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "fedq.train", *command, f"hydra.run.dir={tmp_path}/two"], check=True, timeout=280)
    fedq(tmp_path, *command, "hydra.run.dir=one")
    assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"), 0.01)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_told_in_one_line(tmp_path, monkeypatch, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = fedq(tmp_path, *SMALL, f"run.device={device}", code=1)
    (line,) = done.stderr.splitlines()
    own = "cuda:0" if device == "cuda" else device
    assert f"run.device: {own} cannot be used here: " in line
