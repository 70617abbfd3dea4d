"""The shortest of several coders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.coder import Buffer, Coder
from fedq.encoding.schema import TensorSpec
from fedq.errors import check_range


@dataclass(frozen=True)
class Shortest(Coder):
    """Encodes with each of several coders, and sends the number of the best coder (one byte), then its bytes.

    Of equally short coders it chooses the first. Encoding takes the time of all coders together, decoding the time of
    the chosen one.

    coders: 1 to 256 coders, which all take the symbols.
    """

    canonical_name: ClassVar[str] = "Best"
    """The class's first name, which fingerprints of schemas still use."""

    coders: Sequence[Coder]

    def __post_init__(self) -> None:
        object.__setattr__(self, "coders", tuple(self.coders))
        check_range("the number of coders", len(self.coders), 1, 256)
        for coder in self.coders:
            if not isinstance(coder, Coder):
                raise TypeError(f"{coder!r} is not a coder")

    @override
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        coded = [memoryview(coder.encode(symbols, spec)) for coder in self.coders]
        sizes = [data.nbytes for data in coded]
        best = sizes.index(min(sizes))
        return b"".join((bytes([best]), coded[best]))

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        if not len(data) or data[0] >= len(self.coders):
            raise ValueError(f"the message names none of {len(self.coders)} coders")
        coder, data = self.coders[data[0]], data[1:]
        if coder.size(spec) not in (None, len(data)):
            raise ValueError(f"{len(data)} bytes are not the {coder.size(spec)} of {type(coder).__name__}")
        return coder.decode(data, spec)

    @override
    def model_size(self, data: memoryview) -> int:
        return self.coders[data[0]].model_size(data[1:])
