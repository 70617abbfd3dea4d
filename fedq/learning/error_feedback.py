"""Error feedback: what a message loses is added to the sender's next message."""

from dataclasses import dataclass

from torch import Tensor

from fedq.encoding import Codec, EncodeError, StateDictEncoder
from fedq.encoding.numerics import is_finite
from fedq.encoding.schema import Tensors


@dataclass(frozen=True)
class ErrorFeedback:
    """An encoder with error feedback, for either direction (Seide 2014; Karimireddy 2019).

    The sender keeps the residual: the encoded tensors minus the decoded tensors. The sender adds the residual to the
    tensors of its next message. So small elements that are rounded to 0 are sent in the end, and clipped parts, too.

    encoder: Encodes the tensors with the residual added.
    """

    encoder: StateDictEncoder

    def __post_init__(self) -> None:
        if self.encoder.reference == "last":
            raise ValueError(
                "error_feedback must be false with reference=last: its differences hold the earlier errors already"
            )


Direction = StateDictEncoder | ErrorFeedback
"""The encoder of one direction, with error feedback or without."""


def compensate(tensors: Tensors, residual: Tensors) -> dict[str, Tensor]:
    """Returns the tensors plus the residual of the sender's last message; `residual` is empty before the first."""
    return {n: value + residual[n].to(value.device) if n in residual else value for n, value in tensors.items()}


def residual_of(codec: Codec, tensors: Tensors, decoded: Tensors) -> dict[str, Tensor]:
    """Returns the residual of a message of `tensors`. Raises EncodeError, naming the tensor, for an overflow."""
    residual = {name: tensors[name] - decoded[name] for name in codec.compressed}
    for name, value in residual.items():
        if not is_finite(value):
            raise EncodeError(f"tensor {name!r}: the residual of its message overflows its dtype")
    return residual
