"""What a coder is: symbols ↔ bytes."""

from abc import ABC, abstractmethod

from torch import Tensor

from fedq.encoding.adaptive import Adaptive
from fedq.encoding.spec import Tensors, TensorSpec

Buffer = bytes | memoryview


class Coder(ABC):
    """Turns the last stage's tensor into bytes, exactly. Make it a frozen dataclass, as a stage."""

    def size(self, spec: TensorSpec) -> int | None:
        """Returns how many bytes a tensor of `spec` takes, or None, as here, where that depends on its values."""
        return None

    @abstractmethod
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        """Returns the bytes of `symbols`, a tensor of `spec` on any device; they may share its memory."""

    @abstractmethod
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        """Returns the tensor of `spec` on the CPU. Raises ValueError for bytes that `encode` never makes."""

    def model_size(self, data: memoryview) -> int:
        """Returns how many bytes of `encode`'s `data` tell the model (a table, parameters) and not the symbols."""
        return 0


class AdaptiveCoder(Adaptive):
    """A coder whose model of the symbols is agreed before they travel: it follows the rounds (see Adaptive).

    Its length always depends on the values.
    """

    @abstractmethod
    def encode(self, symbols: Tensor, spec: TensorSpec, params: Tensors) -> tuple[Buffer, Tensors]:
        """As Coder.encode, with this round's params; returns the state-update tensors too."""

    @abstractmethod
    def decode(self, data: memoryview, spec: TensorSpec, params: Tensors) -> Tensor:
        """As Coder.decode, with this round's params."""
