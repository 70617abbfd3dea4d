"""Specs of tensors, which both sides know before a message is sent, and the canonical text of specs and encoders."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """Describes a tensor. Both sides know the spec before a message is sent.

    shape: The tensor's shape.
    dtype: The tensor's dtype.
    levels: The number of symbols 0 … levels − 1; None if the tensor may hold any value of the dtype.
    """

    canonical_name: ClassVar[str] = "TensorSpec"

    shape: tuple[int, ...]
    dtype: torch.dtype
    levels: int | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Returns the spec of `tensor`."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @classmethod
    def symbols(cls, shape: tuple[int, ...], levels: int) -> "TensorSpec":
        """Returns the spec of symbols 0 … levels − 1. Their dtype is uint8 for up to 256 levels, else int32."""
        return cls(shape, torch.uint8 if levels <= 256 else torch.int32, levels)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the tensor as a matrix: the first axis by all others. A vector is one row."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, self.numel // max(rows, 1)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()


Schema = Mapping[str, TensorSpec]
"""The specs of a state_dict's tensors by name, in order."""


def schema_of(tensors: Tensors) -> dict[str, TensorSpec]:
    """Returns the schema of a state_dict."""
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def canonical_text(part: Any) -> str:
    """Returns the text of `part` from which fingerprints are made.

    The text is part of the wire format. The text is like `repr`, with two differences:
    - Arguments with their default value are left out. So a new argument changes no message of existing encoders.
    - A renamed class has its old name in `canonical_name`, and a renamed field in its metadata under this key. So both
      keep their text.

    Raises TypeError for an argument that has no canonical text.
    """
    if dataclasses.is_dataclass(part):
        arguments = []
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value is not None and field.type in (float, "float", float | None, "float | None"):  # 1 is 1.0
                value = float(value)
            try:
                text = canonical_text(value)
            except TypeError as error:
                raise TypeError(f"{type(part).__name__}.{field.name}: {error}") from error
            if value != field.default:
                arguments.append(f"{field.metadata.get('canonical_name', field.name)}={text}")
        # vars: a subclass does not inherit the name
        name = vars(type(part)).get("canonical_name", type(part).__name__)
        return f"{name}({', '.join(arguments)})"
    if isinstance(part, Mapping):
        return canonical_text(list(part.items()))
    if isinstance(part, list | tuple):
        return f"[{', '.join(map(canonical_text, part))}]"
    if not isinstance(part, str | int | float | torch.dtype | None):
        raise TypeError(f"arguments must be plain values, stages or coders, not {type(part).__name__}")
    return repr(float(part) if isinstance(part, float) else part)  # numpy's floats have another repr
