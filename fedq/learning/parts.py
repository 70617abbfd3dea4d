"""The parts of a model: tensors that travel, frozen, personal and tied tensors."""

import hashlib
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedq.encoding.schema import Tensors, TensorSpec, canonical_text
from fedq.errors import FedqError

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Parts:
    """The names of a model's state_dict, in four kinds.

    travels: Tensors that both sides send.
    frozen: Tensors that training does not change: both sides hold them from the start.
    personal: Tensors that each client keeps and never sends.
    tied: For tensors with several names: each further name → the first name, which the other fields use.
    """

    travels: list[str]
    frozen: list[str]
    personal: list[str]
    tied: dict[str, str]

    def travelling(self, tensors: Tensors) -> dict[str, Tensor]:
        """Returns the tensors of a state_dict that travel."""
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
    frozen_names = _fitting("frozen", frozen, names, tied)
    for name, parameter in model.named_parameters():
        if name in frozen_names:
            parameter.requires_grad_(False)
        elif not parameter.requires_grad:
            frozen_names.add(name)
    personal_names = _fitting("personal", personal, names, tied) - frozen_names
    if not (trained := {name for name, parameter in model.named_parameters() if parameter.requires_grad}):
        raise FedqError("model: no parameter to train is left")
    if trained <= personal_names:
        raise FedqError("algorithm.personal: all parameters that train fit a pattern: no update would be sent")
    firsts = [name for name in names if name not in tied]
    travels = [name for name in firsts if name not in frozen_names | personal_names]
    return Parts(travels, [n for n in firsts if n in frozen_names], [n for n in firsts if n in personal_names], tied)


def _fitting(option: str, patterns: Iterable[str], names: Sequence[str], tied: dict[str, str]) -> set[str]:
    """Returns the first names of the tensors that fit one of the patterns under any of their names."""
    result: set[str] = set()
    for pattern in patterns:
        fitting = {tied.get(name, name) for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise FedqError(f"algorithm.{option}: no tensor fits {pattern!r}. The tensors are {', '.join(names)}")
        result |= fitting
    return result


def _ties(model: nn.Module) -> dict[str, str]:
    """Returns the further names of tensors in a state_dict → their first names.

    A Parameter with several names is tied. A buffer with several names is tied if one module holds the buffer. Other
    buffers that are one tensor can become two in training.
    """
    first: dict[object, str] = {}
    tied = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        tensors: list[tuple[str, object]] = [(name, id(p)) for name, p in module._parameters.items() if p is not None]
        tensors += [(name, (id(module), name)) for name in module._buffers]
        for local_name, identity in tensors:
            name = f"{prefix}.{local_name}" if prefix else local_name
            if first.setdefault(identity, name) != name:
                tied[name] = first[identity]
    return {name: tied[name] for name in model.state_dict() if name in tied}


def copied(model: nn.Module) -> nn.Module:
    """Returns a copy of a model. Both share the frozen parameters, which training does not change."""
    return deepcopy(model, {id(value): value for value in model.parameters() if not value.requires_grad})


def load(model: nn.Module, tensors: Tensors) -> None:
    """Loads a state_dict, which may lack frozen parameters. Raises RuntimeError if the names do not fit the model."""
    frozen = {name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if wrong := {*missing, *unexpected} - frozen:
        raise RuntimeError(f"the state_dict and the model differ in {min(wrong)!r}")


def as_bytes(tensor: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Returns a tensor's bytes, in the order of the elements, as one axis of a dtype that is not wider."""
    return tensor.detach().contiguous().reshape(-1).view(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Returns whether two tensors of one shape and dtype hold the same bits, also of NaN."""
    dtype = _INTEGERS.get(left.itemsize, torch.uint8)  # single bytes take four times as long
    return torch.equal(as_bytes(left, dtype), as_bytes(right, dtype))


def checksum(tensor: Tensor) -> int:
    """Returns the sum of a tensor's bytes, eight bytes a number: fast, and enough to notice an accidental change."""
    data = as_bytes(tensor)
    if data.storage_offset() % 8:  # a part of another tensor, which torch cannot view as longer numbers
        data = data.clone()
    end = len(data) // 8 * 8
    return int(data[:end].view(torch.int64).sum()) + int(data[end:].sum())


def digest(tensors: Tensors) -> bytes:
    """Returns the SHA-256 of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(canonical_text([name, TensorSpec.of(tensor)]).encode())
        digest.update(as_bytes(tensor).cpu().numpy().data)
    return digest.digest()
