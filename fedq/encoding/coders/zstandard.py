"""Zstandard: a general compressor, for comparison.

Its entropy coder is Huffman's over bytes. Zstandard also finds repetitions, such as rows of zeros in an update. It may
then be shorter than ANS, which codes symbols one by one. In the measurement of ans.py, encoding takes 538 million
symbols a second, and decoding 469. The bytes are 0.84 % above an entropy of 6.69 bits. Below 1 bit a symbol, they are
far above the entropy. The bytes depend on the library's version; every version decodes them.
"""

import importlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.coder import Buffer, Coder, checked
from fedq.encoding.coders.fixed_width import FixedWidth
from fedq.encoding.coders.raw import Raw
from fedq.encoding.schema import TensorSpec
from fedq.errors import MissingPackage, check_range


@dataclass(frozen=True)
class Zstandard(Coder):
    """Zstandard (RFC 8878) over the symbols' bytes: one frame, without checksum and size.

    Symbols of 1, 2 or 4 bits are packed into bytes first. For symbols of several bytes, all lowest bytes come first,
    then all second bytes, and so on. Signed integers are mapped so that small magnitudes have small codes. Other dtypes
    without levels are compressed as bytes.

    level: 1 (fast) to 22.
    """

    level: int = 1

    def __post_init__(self) -> None:
        check_range("level", self.level, 1, 22, integer=True)

    @override
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        if spec.levels is not None:
            checked(symbols, 0, spec.levels - 1)
        if _signed(spec):
            symbols = (symbols << 1) ^ (symbols >> (8 * spec.dtype.itemsize - 1))
        coder, plain, stride = _plain(spec)
        planes = np.frombuffer(coder.encode(symbols, plain), np.uint8).reshape(-1, stride).T.tobytes()
        compressor = _zstandard().ZstdCompressor(self.level, write_checksum=False, write_content_size=False)
        compressed: bytes = compressor.compress(planes)
        return compressed

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        coder, plain, stride = _plain(spec)
        size, zstandard = coder.size(plain), _zstandard()
        decompressor = zstandard.ZstdDecompressor(max_window_size=max(1 << 10, 1 << size.bit_length()))
        try:
            if zstandard.frame_content_size(data) != -1:  # the decoder would reserve this memory at once
                raise ValueError("a frame declares its size")
            raw = decompressor.decompress(data, max_output_size=max(1, size), allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"not a Zstandard frame of at most {size} bytes: {error}") from error
        if len(raw) != size:
            raise ValueError(f"{len(raw)} bytes are not the {size} expected")
        planes = np.frombuffer(raw, np.uint8).reshape(stride, -1)
        symbols = coder.decode(memoryview(planes.T.tobytes()), plain)
        if spec.levels is not None:
            checked(symbols, 0, spec.levels - 1)
        if _signed(spec):
            symbols = ((symbols >> 1) & torch.iinfo(spec.dtype).max) ^ -(symbols & 1)
        return symbols


def _plain(spec: TensorSpec) -> tuple[FixedWidth | Raw, TensorSpec, int]:
    """Returns the coder that turns symbols into bytes, the spec for this coder, and the bytes of a symbol."""
    if spec.levels is None:
        return Raw(), spec, spec.dtype.itemsize
    levels = next(levels for levels in (2, 4, 16, 256, 1 << 16, spec.levels) if spec.levels <= levels)
    return FixedWidth(), replace(spec, levels=levels), 2 if levels > 256 else 1


def _signed(spec: TensorSpec) -> bool:
    """Returns whether symbols are mapped in the order 0, −1, 1, −2 …; otherwise signs would fill all upper bits."""
    return spec.levels is None and spec.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)


def _zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise MissingPackage('Zstandard needs its package: pip install "fedq[coders]"') from error
