"""Every stage, coder and chain of conf/encoder passes the battery, and wrong stages and coders fail."""

import hashlib
import importlib
import inspect
import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from configured import CONF, DIRECTIONS, NAMES, built, config
from hydra import compose, initialize_config_dir
from torch import Tensor
from toys import Negate, Reverse, Zlib

import fedq.encoding.coders
import fedq.encoding.stages
from fedq.encoding import (
    ANS,
    AdaptiveEncodingStage,
    Coder,
    Encoder,
    EncodingStage,
    FixedWidth,
    Huffman,
    Key,
    Raw,
    StateDictEncoder,
    TensorSpec,
    UniformQuantization,
    schema_of,
    testing,
)
from fedq.encoding.testing import (
    KEY,
    Bound,
    check_coder,
    check_encoder,
    check_stage,
    floating_inputs,
    wave,
)

ROOT = Path(__file__).parents[2]

FAMILIES = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("test_[!b]*.py"))]
STAGES = [pair for module in FAMILIES for pair in getattr(module, "STAGES", [])]
CODERS = [pair for module in FAMILIES for pair in getattr(module, "CODERS", [])]
CODERS += [(Raw(), None), (Zlib(), None), (Zlib(), 8)]
CODERS += [(FixedWidth(), levels) for levels in (1, 2, 3, 4, 5, 8, 16, 100, 128, 255, 256)]
WIDE_CODERS = [pair for module in FAMILIES for pair in getattr(module, "WIDE_CODERS", [])]
WIDE_CODERS += [(FixedWidth(), levels) for levels in (256, 257, 1000, 4096, 10_000, 2**15, 2**16 - 1, 2**16)]


def configured() -> dict[str, Encoder]:
    """Returns every chain of conf/encoder, of both directions and of all rules."""
    chains = {}
    for name, direction in itertools.product(NAMES, DIRECTIONS):
        encoder = built(name, direction)
        chains[f"{name} {direction}"] = encoder.encoder
        chains |= {f"{name} {direction} {pattern}": chain for pattern, chain in encoder.rules.items()}
    return chains


CONFIGURED = configured()
ALONE = [(stage,) for stage, _ in STAGES]
# each class encodes millions of elements once; other objects of the class encode few elements
LARGEST = {type(stage): stage for stage, _ in STAGES} | {type(chain.coder): chain for chain in CONFIGURED.values()}
BOUNDS = {stage: bound for stage, bound in STAGES if bound is not None}
CHAINS = [
    Encoder(),
    Encoder([], Zlib()),
    Encoder([UniformQuantization(5)], Zlib()),
    Encoder([UniformQuantization(11, "nearest")], Raw()),
    Encoder([Negate(), UniformQuantization(6)], FixedWidth()),
    Encoder([UniformQuantization(3), Reverse()], FixedWidth()),  # the symbols are not from the last stage
    Encoder([Reverse(), Negate(), UniformQuantization(9, "nearest"), Reverse()], Zlib()),
    Encoder([Reverse(), Negate()]),
]


def peak(x: Tensor) -> float:
    return float(x.double().abs().max())


def bound_of(encoder: Encoder) -> Bound | None:
    """Returns the largest error allowed for a chain, if the largest error of its one lossy stage is known.

    NaN, as it may refuse such a tensor, for a chain with an absolute step and more than 2^28 of that.
    """
    if absolute := [part.step for part in encoder.stages if not getattr(part, "relative", True)]:
        return lambda x: math.nan if peak(x) * math.sqrt(x.numel()) > 2**28 * absolute[0] else math.inf
    lossy = [stage for stage in encoder.stages if not stage.lossless]
    if not lossy:
        return lambda x: 0.0
    return BOUNDS.get(lossy[0]) if len(lossy) == 1 else None


@pytest.mark.parametrize("name", ["follow_loss", "top_k"])  # follow_loss extends another file, top_k does not
def test_what_is_read_is_what_hydra_composes(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        assert compose("config", [f"encoder={name}"]).encoder == config(name).encoder


@pytest.mark.parametrize(("stage", "bound"), STAGES, ids=[str(stage) for stage, _ in STAGES])
def test_stages(stage: EncodingStage, bound: Bound | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if stage != LARGEST[type(stage)]:
        monkeypatch.setattr(testing.checks, "largest_input", testing.checks.large_input)
    elif isinstance(stage, UniformQuantization):
        monkeypatch.setattr(testing.checks, "largest_input", lambda: wave(5000, 2000))
    check_stage(stage, bound)


@pytest.mark.parametrize("encoder", CHAINS, ids=str)
def test_chains(encoder: Encoder) -> None:
    check_encoder(encoder, bound_of(encoder))


def is_a_stage_alone(chain: Encoder) -> bool:
    """test_stages covers these chains."""
    return isinstance(chain.coder, FixedWidth | Raw) and chain.stages in ALONE


@pytest.mark.parametrize(
    "encoder", {repr(chain): chain for chain in CONFIGURED.values() if not is_a_stage_alone(chain)}.values(), ids=str
)
def test_configured_chains(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    if encoder != LARGEST.get(type(encoder.coder)):
        monkeypatch.setattr(testing.checks, "largest_input", testing.checks.large_input)
    check_encoder(encoder, bound_of(encoder))


@pytest.mark.parametrize("coder", [c.coder for c in LARGEST.values() if isinstance(c, Encoder)], ids=str)
def test_coders_give_back_millions_of_symbols(coder: Coder) -> None:
    """Every symbol is exact. After most chains, an error bound would not show a wrong symbol."""
    symbols = (wave(1100, 2000) > 0.8).to(torch.uint8)
    spec = TensorSpec(symbols.shape, symbols.dtype, levels=2)
    data = coder.encode(symbols, spec)
    assert torch.equal(coder.decode(memoryview(data).cast("B"), spec), symbols)


def test_no_stage_and_no_coder_is_left_out() -> None:
    exported = [getattr(fedq.encoding, name) for name in fedq.encoding.__all__]
    classes = {value for value in exported if inspect.isclass(value) and not inspect.isabstract(value)}
    stages = {value for value in classes if issubclass(value, EncodingStage | AdaptiveEncodingStage)}
    assert stages == {type(stage) for stage, _ in STAGES}
    coders = {type(coder) for coder, _ in CODERS + WIDE_CODERS} | {type(chain.coder) for chain in CONFIGURED.values()}
    assert {value for value in classes if issubclass(value, Coder)} == coders - {Zlib}
    configured = {type(stage) for chain in CONFIGURED.values() for stage in chain.stages}
    assert configured == stages, "a stage has no configuration that uses it"


@pytest.mark.parametrize(("coder", "levels"), CODERS, ids=str)
def test_coders(coder: fedq.encoding.coders.Coder, levels: int | None) -> None:
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        check_coder(coder, levels, dtype)


@pytest.mark.parametrize(("coder", "levels"), WIDE_CODERS, ids=str)
def test_coders_of_many_symbols(coder: fedq.encoding.coders.Coder, levels: int) -> None:
    for dtype in (torch.int32, torch.int64):
        check_coder(coder, levels, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_raw_takes_any_dtype(dtype: torch.dtype) -> None:
    check_coder(Raw(), None, dtype)


WIDTHS = [UniformQuantization(bits, rounding) for bits in range(1, 17) for rounding in ("stochastic", "nearest")]


@pytest.mark.parametrize("stage", WIDTHS, ids=str)
def test_uniform_bytes_by_formula(stage: UniformQuantization) -> None:
    for name, x in floating_inputs().items():
        side = 16 if x.dtype == torch.float64 else 8
        codec = StateDictEncoder(rules={"x": Encoder([stage], FixedWidth())}).bind(schema_of({"x": x}))
        message = codec.encode({"x": x}, KEY).message
        assert len(message) == 48 + side + math.ceil(x.numel() * stage.bits / 8), name


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_uniform_refuses_integers(rounding: str) -> None:
    # a counter that is rounded to a step and truncated would be wrong without an error
    for x in (torch.arange(5), torch.tensor([True, False]), torch.tensor(3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="floating"):
            UniformQuantization(8, rounding).side_spec(TensorSpec.of(x))
        with pytest.raises(ValueError, match="floating"):
            Encoder([UniformQuantization(8, rounding)], FixedWidth()).bind(TensorSpec.of(x)).encode(x, KEY, {})


@pytest.mark.parametrize("bits", range(1, 17))
def test_uniform_ends_are_exact(bits: int) -> None:
    x = wave(1000)
    for rounding in ("stochastic", "nearest"):
        stage = UniformQuantization(bits, rounding)
        y, side = stage.encode(x, KEY)
        back = stage.decode(y, side, TensorSpec.of(x), KEY)
        assert (int(y.min()), int(y.max())) == (0, 2**bits - 1)
        assert torch.equal(back[x.argmin()], x.min())
        torch.testing.assert_close(back[x.argmax()], x.max(), rtol=3e-7, atol=0)
        assert bool((back >= x.min()).all() & (back <= x.max()).all())


@pytest.mark.parametrize(("bits", "rounding"), [(0, "nearest"), (17, "nearest"), (-1, "stochastic"), (8, "up")])
def test_uniform_refuses_arguments(bits: int, rounding: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        UniformQuantization(bits, rounding)


def test_another_process_decodes(tmp_path: Path) -> None:
    own = [
        chain for chain in CHAINS if not any(type(part).__module__ == "toys" for part in (*chain.stages, chain.coder))
    ]
    x = {"x": wave(20, 11), "h": wave(30, dtype=torch.float16), "n": torch.tensor(2**62 + 1)}
    sent = []
    # distributions that no file of conf/encoder has, and more levels than most files have
    own += [Encoder([UniformQuantization(16)], coder) for coder in (ANS("normal"), ANS("laplace"), ANS(), Huffman())]
    for i, chain in enumerate([*own, *CONFIGURED.values()]):
        encoder = StateDictEncoder(chain, threshold=10 * (i % 4))
        codec = encoder.bind(schema_of(x))
        params = codec.adaptation.params(codec.adaptation.initial_state())
        message = codec.encode(x, KEY, params).message
        back, _ = codec.decode(message, KEY, params)
        digest = hashlib.sha256(b"".join(map(testing.raw_bytes, back.values()))).hexdigest()
        sent.append((repr(encoder), message.hex(), digest))
    (tmp_path / "sent.json").write_text(json.dumps(sent))
    program = f"""
import hashlib, json, torch
from fedq.encoding import *
sent = json.load(open({str(tmp_path / "sent.json")!r}))
schema = {{
    "x": TensorSpec((20, 11), torch.float32), "h": TensorSpec((30,), torch.float16), "n": TensorSpec((), torch.int64)
}}
for encoder, message, digest in sent:
    codec = eval(encoder).bind(schema)
    params = codec.adaptation.params(codec.adaptation.initial_state())
    back, _ = codec.decode(bytes.fromhex(message), Key({KEY.seed}, {KEY.round}, {KEY.client}), params)
    raw = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in back.values())
    assert hashlib.sha256(raw).hexdigest() == digest, encoder
print("decoded", len(sent))
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == f"decoded {len(sent)}\n", run.stderr


# ---------------------------------------------------------------------------- wrong stages: one for each check


@dataclass(frozen=True)
class Honest(EncodingStage):
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x.clone(), {}

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y.clone()


@dataclass(frozen=True)
class WritesToInput(Honest):
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        y = x.clone()
        if x.is_contiguous():
            x.mul_(1)  # the values stay the same; only the tensor's version changes
        return y, {}


@dataclass(frozen=True)
class WritesToEncoded(Honest):
    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y.neg_().clone()


@dataclass(frozen=True)
class GlobalRandom(Honest):
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x + torch.rand(()).to(x.dtype), {}


@dataclass(frozen=True)
class GlobalNumpyRandomInDecode(Honest):
    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y + np.random.rand() * 1e-9


@dataclass(frozen=True)
class Clock(Honest):
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x + random.SystemRandom().random(), {}


@dataclass(frozen=True)
class LayoutMatters(Honest):
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return (x if x.is_contiguous() else -x).clone(), {}


@dataclass(frozen=True)
class Flat(Honest):
    def encoded_spec(self, spec: TensorSpec, side: dict[str, Tensor]) -> TensorSpec:
        return TensorSpec((spec.numel,), spec.dtype)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x.reshape(-1).clone(), {}


@dataclass(frozen=True)
class Widens(Honest):
    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y.double()


@dataclass(frozen=True)
class ClaimsLossless(Honest):
    lossless = True

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y + 0  # −0.0 is decoded as 0.0


@dataclass(frozen=True)
class ClaimsUnbiased(Honest):
    unbiased = True

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        noise = key.generator().random(tuple(x.shape)) - 0.48  # the mean is 0.02 too large: 7 standard errors
        return (x.double() + torch.as_tensor(noise)).to(x.dtype), {}


@dataclass(frozen=True)
class OneDrawForAll(Honest):
    """Ignores the key: all rounds and clients share their noise."""

    unbiased = True

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        noise = Key(0).generator().random(tuple(x.shape)) - 0.5
        return (x.double() + torch.as_tensor(noise)).to(x.dtype), {}


@dataclass(frozen=True)
class ClaimsToCommute(Honest):
    commutes_with_sum = True

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x + 1, {}

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y - 1


@dataclass(frozen=True)
class MuchBeside(Honest):
    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {name: TensorSpec((), torch.float64) for name in "abc"}

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x.clone(), {name: torch.zeros((), dtype=torch.float64) for name in "abc"}


@dataclass
class NotFrozen(EncodingStage):
    encode = Honest.encode
    decode = Honest.decode


@dataclass(frozen=True)
class Rounds(UniformQuantization):
    """The stage claims an error of half a step, and makes an error of a step."""

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        shift = (float(side["maximum"]) - float(side["minimum"])) / (2**self.bits - 1)
        return super().decode(y, side, spec, key) + shift / 4


def test_the_battery_takes_an_honest_stage() -> None:
    check_stage(Honest(), lambda x: 0)


LIARS = {
    WritesToInput: "is written to",
    WritesToEncoded: "wrote to y",
    GlobalRandom: "global random state",
    GlobalNumpyRandomInDecode: "global random state",
    Clock: "other bytes",
    LayoutMatters: "layout",
    ClaimsLossless: "not exact",
    ClaimsUnbiased: "unbiased",
    OneDrawForAll: "two keys",
    ClaimsToCommute: "commute",
    MuchBeside: "beside the symbols",
}


@pytest.mark.parametrize("liar", LIARS, ids=lambda liar: liar.__name__)
def test_the_battery_finds(liar: type[EncodingStage]) -> None:
    with pytest.raises(AssertionError, match=LIARS[liar]):
        check_stage(liar())


def test_the_battery_finds_too_large_an_error() -> None:
    with pytest.raises(AssertionError, match="is allowed"):
        check_stage(Rounds(6, "nearest"), lambda x: float(x.max() - x.min()) / 63 / 1.9)


def test_the_battery_finds_a_stage_that_is_not_frozen() -> None:
    with pytest.raises(AssertionError, match="not frozen"):
        testing.checks.check_dataclasses(Encoder([NotFrozen()]), None)
