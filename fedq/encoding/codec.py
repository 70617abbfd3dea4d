"""A codec: an encoder bound to the schema of a group of tensors; tensors ↔ one message."""

import hashlib
import math
import struct
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedq.encoding import message as frame
from fedq.encoding.adaptation import Adaptation
from fedq.encoding.adaptive import Adaptive
from fedq.encoding.encoder import TensorCodec, read, write
from fedq.encoding.message import MessageError
from fedq.encoding.numerics import CHUNK, exact_divide, finite, is_finite, saturate
from fedq.encoding.rate_control import RateController
from fedq.encoding.schema import Schema, Tensors, TensorSpec, canonical_text, schema_of
from fedq.errors import FedqError
from fedq.keys import Key

JOINT = "*"
"""The name of the joint vector, after the codec's prefix; no tensor of a module has this name."""

RATE_CONTROL = "*pace/0"
"""The path of rate control among the adaptive parts, after the codec's prefix; part of the wire format."""

_SCALAR = TensorSpec((), torch.float32)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class EncodeError(FedqError, ValueError):
    """A tensor cannot be sent; names the tensor."""


class Encoded(NamedTuple):
    """The result of `Codec.encode`.

    message: The bytes to send.
    reports: Reports to the adaptive parts, flat.
    """

    message: bytes
    reports: dict[str, Tensor]


class Decoded(NamedTuple):
    """The result of `Codec.decode`; all tensors are finite.

    tensors: The tensors of the schema.
    attached: The attached tensors, on the CPU.
    """

    tensors: dict[str, Tensor]
    attached: dict[str, Tensor]


class Codec:
    """A StateDictEncoder bound to one schema; `StateDictEncoder.bind` makes it.

    The body of a message holds the attached tensors, exact, then the common scale, then a payload for each tensor in
    the schema's order. The common scale is float64 if a compressed tensor is float64, else float32.

    schema: The specs of the tensors, in order.
    attached_schema: The specs of the attached tensors.
    chains: The codec of each encoded tensor, by name. The joint vector stands in the place of its first tensor.
    compressed: The names of the tensors that pass stages.
    adaptation: The adaptive stages and rate control.
    sends_differences: Whether messages hold differences from a reference.
    """

    def __init__(
        self,
        schema: Schema,
        chains: Mapping[str, TensorCodec],
        joined: list[str],
        *,
        attached: Schema,
        reports: bool,
        reference: str,
        common_scale: bool,
        rate_control: RateController | None,
        prefix: str,
    ) -> None:
        self.schema, self.chains = dict(schema), chains
        self._joint, self._rate_path = prefix + JOINT, prefix + RATE_CONTROL
        self._joined, self._common_scale, self._rate_control = joined, common_scale, rate_control
        parts: dict[str, tuple[Adaptive, TensorSpec]] = {
            path: (stage, chain.spec) for chain in chains.values() for path, stage in chain.adaptive.items()
        }
        if rate_control:
            parts[self._rate_path] = (rate_control, _SCALAR)
        self.adaptation = Adaptation(parts)
        self._attached = dict(attached)
        self.attached_schema = self._attached | (self.adaptation.report_schema if reports else {})
        of_joint = joined if joined and chains[self._joint].compresses else ()
        self.compressed = [name for name in schema if name in of_joint or (name in chains and chains[name].compresses)]
        wide = any(schema[name].dtype == torch.float64 for name in self.compressed)
        self._scale_spec = TensorSpec((), torch.float64 if wide else torch.float32)
        self._reference = reference
        self.sends_differences = reference != "none" and bool(self.compressed)
        agreed: list[object] = [
            list(schema.items()),
            [(name, (chain.spec, chain.encoder)) for name, chain in chains.items()],
            list(self.attached_schema.items()),
        ]
        if reference != "none" or common_scale:
            agreed += [reference, common_scale]
        self._of_schema = self._fingerprint = hashlib.blake2b(canonical_text(agreed).encode(), digest_size=8).digest()

    def agree_on(self, digest: bytes) -> None:
        """Adds a digest to the fingerprint: the digest of tensors that both sides hold and no message sends."""
        self._fingerprint = hashlib.blake2b(self._of_schema + digest, digest_size=8).digest()

    def encode(
        self,
        tensors: Tensors,
        key: Key,
        params: Tensors | None = None,
        *,
        attached: Tensors | None = None,
        reference: Tensors | None = None,
        loss: float | None = None,
    ) -> Encoded:
        """Returns the message of `tensors`, and the reports to the adaptive parts.

        tensors: The tensors of the schema.
        key: The key of the stages' random draws. The frame holds its seed, round and client.
        params: The params of the adaptive parts, flat.
        attached: The attached tensors, as bound.
        reference: The tensors to subtract, if the encoder has a reference.
        loss: The training loss of the client, for rate control that follows the loss.

        Raises TypeError, naming the tensor, for names, shapes or dtypes to which the codec is not bound. Raises
        EncodeError, naming the tensor, for NaN, infinity, and tensors that a stage cannot encode.
        """
        attached, params = attached or {}, params or {}
        _check_schema(tensors, self.schema)
        _check_schema(attached, self._attached)
        self._check_params(params)
        tensors = {name: tensors[name].detach() for name in self.schema}
        references = {} if self._reference == "none" else self._references(reference)
        for name in self.schema:
            sendable = is_finite(tensors[name])
            if sendable and name in references:
                tensors[name] = tensors[name] - references[name]
                sendable = is_finite(tensors[name])
            if not sendable:
                raise EncodeError(f"tensor {name!r} holds NaN or infinity and is not sent")
        parts: list[bytes | memoryview] = []
        if self._common_scale:
            factor = float(params[f"{self._rate_path}/factor"]) if self._rate_control else 1.0
            scale = common_scale({name: tensors[name] for name in self.compressed}, factor, self._scale_spec.dtype)
            tensors |= {name: _divided(name, tensors[name], scale) for name in self.compressed}
            parts += write(scale, self._scale_spec)
        if self._joined:
            tensors[self._joint] = torch.cat([tensors[name].reshape(-1) for name in self._joined])
        payloads: list[bytes | memoryview] = []
        reports: dict[str, Tensor] = {}
        for name, chain in self.chains.items():
            try:
                payload, reported = chain.encode(tensors[name], key.fold(name), params)
            except ValueError as error:
                raise EncodeError(f"tensor {name!r} cannot be encoded: {error}") from error
            payloads += payload
            reports |= reported
        if self._rate_control:
            # a message of zeros, such as the first difference from the initial weights, says nothing about the rate
            measured = any(bool(tensors[name].any()) for name in self.compressed)
            bits = 8 * sum(memoryview(part).nbytes for part in payloads) if measured else 0
            rate = bits / max(1, sum(spec.numel for spec in self.schema.values()))
            reports |= {f"{self._rate_path}/{n}": t for n, t in self._rate_control.report(rate, loss).items()}
        in_front, front = {**attached, **reports}, []
        for name, spec in self.attached_schema.items():
            if not is_finite(in_front[name]):
                raise EncodeError(f"tensor {name!r} holds NaN or infinity and is not sent")
            front += write(in_front[name], spec)
        fingerprint = self.fingerprint(references) if references else self._fingerprint
        return Encoded(frame.pack(front + parts + payloads, fingerprint, key), reports)

    def decode(
        self,
        message: bytes,
        key: Key,
        params: Tensors | None = None,
        *,
        reference: Tensors | None = None,
        device: torch.device | str = "cpu",
        stop_at_sum: bool = False,
    ) -> Decoded:
        """Returns the tensors of a message, on `device`, and the attached tensors.

        message: Any bytes.
        key: The key of `encode`.
        params: The params of the adaptive parts; None if they are among the message's attached tensors.
        reference: The tensors to add to differences, if the encoder has a reference.
        device: The device of the tensors.
        stop_at_sum: Whether to leave the stages that commute with the sum undone. The tensors are then named as in
            `chains`; `decode_sum` takes their sum over clients.

        Raises MessageError, and nothing else, for bytes that are no message of this codec and key, or that decode to
        NaN or infinity. Takes no more memory than the schema's tensors.
        """
        if stop_at_sum and self._reference != "none":
            raise TypeError(f"a sum of differences from reference={self._reference!r} is not a sum of tensors")
        references = {} if self._reference == "none" else self._references(reference)
        fingerprint = self.fingerprint(references) if references else self._fingerprint
        self._check_params(self.attached_schema if params is None else params)
        reader = frame.unpack(message, fingerprint, key)
        attached: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        what = ""
        try:
            for name, spec in self.attached_schema.items():
                what = f"tensor {name!r}"
                attached[name] = read(reader, spec)
            what = "the common scale"
            scale = read(reader, self._scale_spec) if self._common_scale else torch.ones(())
            if not scale > 0:
                raise ValueError(f"{float(scale)} is no scale")
            params = attached if params is None else params
            for name, chain in self.chains.items():
                what = f"tensor {name!r}"
                tensor = chain.decode(reader, key.fold(name), params, torch.device(device), stop_at_sum)
                if self._common_scale and chain.compresses:
                    tensor = _multiplied_(tensor, scale)
                tensors[name] = tensor
            what = "the end of the body"
            if reader.left:
                raise ValueError(f"{len(reader.left)} bytes are left over")
            if not stop_at_sum:
                tensors = self._split(tensors) if self._joined else tensors
                for name, other in references.items():
                    what = f"tensor {name!r}"
                    tensors[name] = saturate(tensors[name] + other, other.dtype)
        except ValueError as error:
            raise MessageError(f"{what} cannot be decoded: {error}") from error
        return Decoded(tensors, attached)

    def decode_sum(self, total: Tensors, key: Key, params: Tensors) -> dict[str, Tensor]:
        """Returns the tensors of the schema from a sum of results of `decode` with `stop_at_sum`.

        total: The sum over clients, weighted or not.
        key: The key of the round, with any client.
        params: The params of the adaptive parts.

        A tensor without stages left to decode is returned as it is, in the dtype of the sum. Raises MessageError,
        naming the tensor, if a sum or a decoded tensor is not finite: a sum of finite messages can overflow.
        """
        tensors: dict[str, Tensor] = {}
        for name, chain in self.chains.items():
            try:
                specs = chain.summable_prefix  # a stage that commutes with the sum has no side values
                sides: list[Tensors] = [{}] * len(specs)
                tensors[name] = chain.decode_stages(finite(total[name]), specs, sides, key.fold(name), params)
            except ValueError as error:
                raise MessageError(f"tensor {name!r} cannot be decoded: {error}") from error
        return self._split(tensors) if self._joined else tensors

    def fingerprint(self, references: Tensors) -> bytes:
        """Returns the hash of what both sides must agree on to read each other's messages.

        The hash covers schema, chains, and the sum of each reference tensor's elements, whose bits count as integers.
        """
        if not references:
            return self._fingerprint
        sums = [int(references[name].view(_INTEGERS[self.schema[name].dtype.itemsize]).sum()) for name in references]
        return hashlib.blake2b(self._fingerprint + struct.pack(f"<{len(sums)}q", *sums), digest_size=8).digest()

    def expects(self, message: bytes, reference: Tensors) -> bool:
        """Returns whether the header of `message` names this codec and `reference`."""
        references = {} if self._reference == "none" else self._references(reference)
        return frame.peek(message)[0] == self.fingerprint(references)

    def _check_params(self, given: Mapping[str, object]) -> None:
        if self.adaptation.params_schema.keys() - given.keys():
            raise TypeError("an encoder with adaptive parts must be given their params: params=")

    def _references(self, reference: Tensors | None) -> Tensors:
        """Returns the reference of each compressed tensor. Raises TypeError if `reference` lacks one."""
        if reference is None:
            raise TypeError(f"a state_dict must be given for reference={self._reference!r}")
        names = self.compressed
        if any(name not in reference or TensorSpec.of(reference[name]) != self.schema[name] for name in names):
            raise TypeError(f"the reference={self._reference!r} has other names, shapes or dtypes than the state_dict")
        return {name: reference[name] for name in names}

    def _split(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the schema, in its order, with the joint vector cut into its tensors."""
        pieces = torch.split(tensors.pop(self._joint), [self.schema[name].numel for name in self._joined])
        for name, piece in zip(self._joined, pieces, strict=True):
            tensors[name] = piece.reshape(self.schema[name].shape)
        return {name: tensors[name] for name in self.schema}


def _check_schema(tensors: Tensors, bound: Schema) -> None:
    if (given := schema_of(tensors)) != bound:
        wrong = next(name for name in (*given, *bound) if given.get(name) != bound.get(name))
        raise TypeError(f"tensor {wrong!r} is {given.get(wrong)}, the codec is bound to {bound.get(wrong)}")


def common_scale(tensors: Tensors, factor: float, dtype: torch.dtype) -> Tensor:
    """Returns the root mean square over all tensors, times `factor`, as a scalar above 0; 1 if all elements are 0.

    Raises EncodeError for an overflow.
    """
    norms = {}
    for name, tensor in tensors.items():  # in contiguous pieces: other norms depend on the number of threads
        pieces = torch.split(tensor.reshape(-1).contiguous(), CHUNK)
        norms[name] = math.hypot(*(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in pieces))
    value = factor * math.hypot(*norms.values()) / math.sqrt(max(1, sum(t.numel() for t in tensors.values())))
    if not value < torch.finfo(dtype).max:
        raise EncodeError(f"tensor {max(norms, key=lambda name: norms[name])!r} is too large for a common scale")
    return torch.tensor(max(value, torch.finfo(dtype).smallest_normal) if value else 1.0, dtype=dtype)


def _divided(name: str, tensor: Tensor, scale: Tensor) -> Tensor:
    work = torch.promote_types(tensor.dtype, scale.dtype)
    result = exact_divide(tensor.to(work), float(scale)).to(tensor.dtype)
    if result.dtype.itemsize == 2 and not is_finite(result):
        raise EncodeError(f"tensor {name!r} overflows {tensor.dtype} once divided by the common scale {float(scale):g}")
    return result


def _multiplied_(tensor: Tensor, scale: Tensor) -> Tensor:
    """Returns the product, saturated at the dtype's limits; may write to `tensor`."""
    work = torch.promote_types(tensor.dtype, scale.dtype)
    return saturate(tensor.to(work).mul_(float(scale)), tensor.dtype)
