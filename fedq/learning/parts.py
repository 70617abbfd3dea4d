"""The parts of a model: what travels, what is frozen, what is personal, what is tied."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedq.encoding.schema import Tensors, TensorSpec, canonical_text
from fedq.errors import FedqError

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Parts:
    """The names of a model's state_dict, by what happens to the tensor.

    travels: Tensors that both sides send.
    frozen: Tensors that training does not change: both sides hold them from the start.
    personal: Tensors that each client keeps to itself.
    tied: Further names of a tensor that has several → its first name, which stands in the other fields.
    """

    travels: list[str]
    frozen: list[str]
    personal: list[str]
    tied: dict[str, str]

    def travelling(self, tensors: Tensors) -> dict[str, Tensor]:
        """Returns the tensors that travel, of those of a state_dict."""
        return {name: tensors[name] for name in self.travels}

    def with_ties(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `tensors` with tied tensors under all their names."""
        return tensors | {name: tensors[first] for name, first in self.tied.items()}


def parts_of(model: nn.Module, frozen: Sequence[str], personal: Sequence[str]) -> Parts:
    """Returns the parts of a model. Parameters that fit a pattern of `frozen` are frozen here.

    frozen: Shell patterns of names: parameters to freeze, and buffers that are constant. Parameters with
        requires_grad=False are frozen without a pattern.
    personal: Shell patterns of names: tensors that are personal unless they are frozen.

    Raises FedqError for a pattern that fits no tensor, and if no parameter is left to train or to send.
    """
    names, tied = list(model.state_dict()), _ties(model)
    fixed = _fitting("frozen", frozen, names, tied)
    for name, parameter in model.named_parameters():
        if name in fixed:
            parameter.requires_grad_(False)
        elif not parameter.requires_grad:
            fixed.add(name)
    own = _fitting("personal", personal, names, tied) - fixed
    if not (trained := {name for name, parameter in model.named_parameters() if parameter.requires_grad}):
        raise FedqError("model: it has no parameter to train")
    if trained <= own:
        raise FedqError("algorithm.personal: every parameter that trains fits a pattern, so that none would be sent")
    firsts = [name for name in names if name not in tied]
    travels = [name for name in firsts if name not in fixed | own]
    return Parts(travels, [n for n in firsts if n in fixed], [n for n in firsts if n in own], tied)


def _fitting(what: str, patterns: Iterable[str], names: Sequence[str], tied: dict[str, str]) -> set[str]:
    """Returns the first names of the tensors that fit one of the patterns under any of their names."""
    found: set[str] = set()
    for pattern in patterns:
        fitting = {tied.get(name, name) for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise FedqError(f"algorithm.{what}: no tensor fits {pattern!r}. The tensors are {', '.join(names)}")
        found |= fitting
    return found


def _ties(model: nn.Module) -> dict[str, str]:
    """Returns the further names of tensors in a state_dict → their first names.

    Tied are one Parameter under several names, and the buffers of one module under several names. Other buffers that
    are one tensor can part in training.
    """
    first: dict[object, str] = {}
    tied = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        tensors: list[tuple[str, object]] = [(name, id(p)) for name, p in module._parameters.items() if p is not None]
        tensors += [(name, (id(module), name)) for name in module._buffers]
        for own, identity in tensors:
            name = f"{prefix}.{own}" if prefix else own
            if first.setdefault(identity, name) != name:
                tied[name] = first[identity]
    return {name: tied[name] for name in model.state_dict() if name in tied}


def as_bytes(tensor: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Returns the bytes of a tensor in the order of its elements: one axis, of any dtype that is not wider."""
    return tensor.detach().contiguous().reshape(-1).view(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Returns whether two tensors of one shape and dtype hold the same bits, also of NaN."""
    dtype = _INTEGERS.get(left.itemsize, torch.uint8)  # bytes take four times as long
    return torch.equal(as_bytes(left, dtype), as_bytes(right, dtype))


def digest(tensors: Tensors) -> bytes:
    """Returns the SHA-256 of names, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(canonical_text([name, TensorSpec.of(tensor)]).encode())
        found.update(as_bytes(tensor).cpu().numpy().data)
    return found.digest()
