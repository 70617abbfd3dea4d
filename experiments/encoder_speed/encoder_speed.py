"""Times encoding and decoding of a float32 tensor against a copy of the tensor by torch, with one thread.

Each row is timed directly after the second of two copies. A drift of the machine's speed then affects row and copy
alike. If the tensor fits into the cache, the copy finds it there. Prints the median time and the median of the ratios.

python -m experiments.encoder_speed.encoder_speed [--repeats 31] [--large]
"""

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from rich.table import Table
from torch import Tensor

from experiments.tables import show
from fedq.encoding import (
    ANS,
    QSGD,
    Cast,
    Coder,
    CosineRotation,
    Eden,
    Encoder,
    FixedWidth,
    HadamardRotation,
    Huffman,
    Key,
    LloydMax,
    RandomMask,
    Raw,
    ScaledSign,
    StepQuantization,
    TensorSpec,
    TopK,
    UniformQuantization,
    Zstandard,
)
from fedq.encoding.encoder import TensorCodec
from fedq.encoding.message import Reader

SIZES = (1_605_632, 10_000_000)  # the CNN's largest layer, and a tensor larger than any cache
LARGE = 100_000_000
KEY = Key(0)

CHAINS = {
    "uniform, 8 bits, stochastic": Encoder([UniformQuantization(8)], FixedWidth()),
    "uniform, 8 bits, nearest": Encoder([UniformQuantization(8, "nearest")], FixedWidth()),
    "uniform, 8 bits, dithered": Encoder([UniformQuantization(8, "dithered")], FixedWidth()),
    "uniform, 8 bits, blocks of 1024": Encoder([UniformQuantization(8, block=1024)], FixedWidth()),
    "uniform, 4 bits, clipped at 0.999": Encoder([UniformQuantization(4, quantile=0.999)], FixedWidth()),
    "uniform, 4 bits, stochastic": Encoder([UniformQuantization(4)], FixedWidth()),
    "uniform, 3 bits, stochastic": Encoder([UniformQuantization(3)], FixedWidth()),
    "uniform, 1 bit, stochastic": Encoder([UniformQuantization(1)], FixedWidth()),
    "step, with centroids, uncoded": Encoder([StepQuantization(0.5, centroids=True)], Raw()),
    "float16": Encoder([Cast("float16")]),
    "float8, scaled": Encoder([Cast("float8_e4m3fn", scale=True)]),
    "Hadamard, blocks of 1024": Encoder([HadamardRotation(1024)]),
    "cosine, blocks of 4096": Encoder([CosineRotation(4096)]),
    "Hadamard and EDEN, 1 bit": Encoder([HadamardRotation(1024), Eden(1)], FixedWidth()),
    "sign": Encoder([ScaledSign()], FixedWidth()),
    "QSGD": Encoder([QSGD()], FixedWidth()),
    "Lloyd–Max, 4 bits": Encoder([LloydMax(4)], FixedWidth()),
    "top 10 %": Encoder([TopK(0.1)]),
    "random 10 %": Encoder([RandomMask(0.1)]),
}
CODERS: list[tuple[str, Coder, int]] = [
    *((f"{levels} levels, packed", FixedWidth(), levels) for levels in (2, 4, 8, 16)),
    *((f"{levels} levels, ANS", ANS(), levels) for levels in (16, 256)),
    *((f"{levels} levels, Huffman", Huffman(), levels) for levels in (16, 256)),
    *((f"{levels} levels, Zstandard", Zstandard(), levels) for levels in (16, 256)),
]


def rows(x: Tensor) -> list[tuple[str, Callable[[], object]]]:
    """Returns name and function of each row."""
    # decoding needs memory that the system has not handed out yet
    listed: list[tuple[str, Callable[[], object]]] = [("copy into fresh memory", x.clone)]
    spec = TensorSpec.of(x)
    for name, encoder in CHAINS.items():
        codec = encoder.bind(spec)
        payload = b"".join(codec.encode(x, KEY, {})[0])

        def encode(codec: TensorCodec = codec) -> object:
            return codec.encode(x, KEY, {})

        def decode(codec: TensorCodec = codec, payload: bytes = payload) -> object:
            return codec.decode(Reader(memoryview(payload)), KEY, {}, x.device, False)

        listed += [(f"{name}: encode", encode), (f"{name}: decode", decode)]
    for name, coder, levels in CODERS:
        # symbols of a quantiser from −4 to 4 standard deviations
        symbols = ((x.clamp(-3.99, 3.99) + 4) * levels / 8).to(torch.uint8)
        coded = TensorSpec(spec.shape, torch.uint8, levels)
        data = memoryview(coder.encode(symbols, coded))

        def pack(coder: Coder = coder, symbols: Tensor = symbols, coded: TensorSpec = coded) -> object:
            return coder.encode(symbols, coded)

        def unpack(coder: Coder = coder, data: memoryview = data, coded: TensorSpec = coded) -> object:
            return coder.decode(data, coded)

        listed += [(f"{name}: encode", pack), (f"{name}: decode", unpack)]
    return listed


def seconds(work: Callable[[], object]) -> float:
    """Returns the seconds that `work` takes."""
    started = perf_counter()
    work()
    return perf_counter() - started


def timed(x: Tensor, target: Tensor, work: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds of a copy and of `work`, one after the other."""
    target.copy_(x)
    return seconds(lambda: target.copy_(x)), seconds(work)


def main() -> None:
    """Prints a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--large", action="store_true", help=f"also time {LARGE:,} elements")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in (*SIZES, *([LARGE] if arguments.large else [])):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        target = torch.empty_like(x)
        repeats = max(3, arguments.repeats * SIZES[0] // size)
        table = Table("", "milliseconds", "ratio to the copy", title=f"{size:,} elements, {repeats} repeats")
        for name, work in rows(x):
            work()  # warms up
            pairs = [timed(x, target, work) for _ in range(repeats)]
            copy, own = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            table.add_row(name, f"{own * 1000:.2f}", f"{ratio:.1f}")
        table.add_row("copy", f"{copy * 1000:.3f}", "1")
        show(table)


if __name__ == "__main__":
    main()
