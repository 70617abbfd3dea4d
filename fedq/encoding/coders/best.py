"""The shortest of several."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedq.encoding.coders.coder import Buffer, Coder
from fedq.encoding.schema import TensorSpec


@dataclass(frozen=True)
class Best(Coder):
    """Codes with each of several coders and sends the shortest, behind one byte that tells which: the first of equals.

    It takes as long to encode as all of them together, and to decode as the one that was chosen.

    coders: 1 to 256, each of which takes the symbols.
    """

    coders: Sequence[Coder]

    def __post_init__(self) -> None:
        object.__setattr__(self, "coders", tuple(self.coders))
        if not 1 <= len(self.coders) <= 256:
            raise ValueError(f"coders must be 1 to 256, not {len(self.coders)}")
        for coder in self.coders:
            if not isinstance(coder, Coder):
                raise TypeError(f"{coder!r} is not a coder, or one that learns")

    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        """As Coder.encode."""
        coded = [memoryview(coder.encode(symbols, spec)) for coder in self.coders]
        sizes = [data.nbytes for data in coded]
        best = sizes.index(min(sizes))
        return b"".join((bytes([best]), coded[best]))

    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        """As Coder.decode."""
        if not len(data) or data[0] >= len(self.coders):
            raise ValueError(f"which of {len(self.coders)} coders is not told")
        coder, data = self.coders[data[0]], data[1:]
        if coder.size(spec) not in (None, len(data)):
            raise ValueError(f"{len(data)} bytes are not the {coder.size(spec)} of {type(coder).__name__}")
        return coder.decode(data, spec)

    def model_size(self, data: memoryview) -> int:
        """As Coder.model_size."""
        return self.coders[data[0]].model_size(data[1:])
