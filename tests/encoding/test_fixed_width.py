"""Compares FixedWidth with another implementation."""

import numpy as np
import pytest
import torch

from fedq.encoding import FixedWidth, Key, TensorSpec, UniformQuantization

LENGTHS = range(71)


def pack(symbols: np.ndarray, width: int) -> bytes:
    """Packs bit by bit: symbol after symbol, least significant bit first."""
    bits = (symbols[:, None].astype(np.int64) >> np.arange(width)) & 1
    return np.packbits(bits.reshape(-1).astype(np.uint8), bitorder="little").tobytes()


def symbols_of(n: int, levels: int) -> np.ndarray:
    """Returns pseudo-random symbols, including the largest."""
    symbols = Key(n, levels).generator().integers(0, levels, n)
    symbols[n // 2 : n // 2 + 1] = levels - 1
    return symbols


def spec_of(n: int, levels: int) -> TensorSpec:
    return TensorSpec((n,), torch.uint8 if levels <= 256 else torch.int32, levels)


@pytest.mark.parametrize("width", range(1, 17))
def test_agrees_with_packbits(width: int) -> None:
    coder, levels = FixedWidth(), 2**width
    for n in LENGTHS:
        symbols, spec = symbols_of(n, levels), spec_of(n, levels)
        data = coder.encode(torch.from_numpy(symbols).to(spec.dtype), spec)
        assert data == pack(symbols, width), n
        assert len(data) == coder.size(spec) == -(-n * width // 8)
        back = coder.decode(memoryview(data), spec)
        assert back.dtype == spec.dtype
        assert back.tolist() == symbols.tolist(), n


@pytest.mark.parametrize("levels", [1, 3, 5, 6, 7, 9, 100, 129, 200, 255, 257, 1000, 4095, 40_000, 65_535])
def test_levels_not_a_power_of_two(levels: int) -> None:
    coder, width = FixedWidth(), max(1, (levels - 1).bit_length())
    for n in LENGTHS:
        symbols, spec = symbols_of(n, levels), spec_of(n, levels)
        data = coder.encode(torch.from_numpy(symbols).to(spec.dtype), spec)
        assert data == pack(symbols, width)
        assert coder.decode(memoryview(data), spec).tolist() == symbols.tolist()


@pytest.mark.parametrize("levels", [1, 3, 5, 100, 255, 257, 1000, 65_535])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 70])
def test_a_symbol_out_of_range_is_refused(levels: int, n: int) -> None:
    coder, width, spec = FixedWidth(), max(1, (levels - 1).bit_length()), spec_of(n, levels)
    for place in (0, n // 2, n - 1):
        for symbol in {levels, 2**width - 1}:
            symbols = symbols_of(n, levels)
            symbols[place] = symbol
            with pytest.raises(ValueError, match="not below"):
                coder.decode(memoryview(pack(symbols, width)), spec)


@pytest.mark.parametrize("levels", [1, 2, 3, 8, 128, 256, 300, 4096, 2**16])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_a_symbol_out_of_range_is_not_packed(levels: int, dtype: torch.dtype) -> None:
    # the symbol would change its neighbours, and the receiver would decode other values without an error
    for symbol in (levels, -1, 2**15 - 1 if levels < 2**15 else -(2**15)):
        symbols = torch.zeros(9, dtype=torch.int64)
        symbols[4] = symbol
        symbols = symbols.to(dtype)
        if int(symbols[4]) == symbol:  # the dtype can hold the symbol
            with pytest.raises(ValueError, match="not from 0 to"):
                FixedWidth().encode(symbols, TensorSpec((9,), dtype, levels))


@pytest.mark.parametrize("width", [w for w in range(1, 17) if w != 8 and w != 16])
def test_padding_bits_that_are_not_zero_are_refused(width: int) -> None:
    coder, levels = FixedWidth(), 2**width
    for n in range(1, 20):
        spec, used = spec_of(n, levels), n * width % 8
        data = bytearray(pack(symbols_of(n, levels), width))
        for bit in range(used, 8 if used else 0):
            data[-1] ^= 1 << bit
            with pytest.raises(ValueError, match="unused bits"):
                coder.decode(memoryview(bytes(data)), spec)
            data[-1] ^= 1 << bit
        coder.decode(memoryview(bytes(data)), spec)


@pytest.mark.parametrize("levels", [None, 0, -1, 2**16 + 1])
def test_levels_that_do_not_fit_are_the_authors_error(levels: int | None) -> None:
    spec = TensorSpec((3,), torch.int32, levels)
    with pytest.raises(ValueError, match="levels"):
        FixedWidth().encode(torch.zeros(3, dtype=torch.int32), spec)


def test_a_stage_that_gives_symbols_of_any_shape() -> None:
    x = torch.linspace(-1, 1, 105).reshape(3, 5, 7).transpose(0, 2)
    stage = UniformQuantization(5, "nearest")
    y, side = stage.encode(x, Key(0))
    spec = stage.encoded_spec(TensorSpec.of(x), side)
    assert FixedWidth().encode(y, spec) == pack(y.numpy().reshape(-1), 5)
    assert torch.equal(FixedWidth().decode(memoryview(FixedWidth().encode(y, spec)), spec), y)
