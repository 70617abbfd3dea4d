"""The frame of a message: how it is written, and how it is checked.

A message is a header, a body and a checksum, all little-endian:

    offset  size
         0     4  magic, "FEDQ"
         4     2  format version
         6     2  reserved, zero
         8     8  fingerprint of the schema both sides hold
        16     8  key: run seed
        24     4  key: round
        28     8  key: client, or 2⁶⁴ − 1 for a broadcast
        36     8  length of the body in bytes, n
        44     n  body
    44 + n     4  CRC-32 (ISO/IEC 8802-3, as in zlib) of the header and the body

The checksum finds accidents, not forgeries. So decoders check every part of the body again.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from fedq.errors import FedqError
from fedq.keys import Key

VERSION = 4
OVERHEAD = 48
"""Bytes of a message beside its body."""

_HEADER = struct.Struct("<4sHH8sQIQQ")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"FEDQ"


class MessageError(FedqError, ValueError):
    """The bytes are no message of this schema and key; says why."""


class SchemaMismatch(MessageError):
    """The frame is undamaged, but has another schema, encoder or reference."""


@cache
def _crc32() -> Callable[..., int]:
    """Returns isal's CRC-32 if isal is installed, else zlib's. The values are equal; isal is several times faster."""
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        from zlib import crc32
    return crc32


def pack(parts: Sequence[bytes | memoryview], fingerprint: bytes, key: Key) -> bytes:
    """Returns a message. Its body is `parts` in a row; `fingerprint` has 8 bytes."""
    size = sum(memoryview(part).nbytes for part in parts)
    header = _HEADER.pack(_MAGIC, VERSION, 0, fingerprint, key.seed, key.round, key.client, size)
    crc32 = _crc32()
    checksum = crc32(header)
    for part in parts:
        checksum = crc32(part, checksum)
    return b"".join((header, *parts, _CHECKSUM.pack(checksum)))


def varint(number: int) -> bytes:
    """Returns `number` (0 … 2^63 − 1) as LEB128: 7 bits a byte, lowest first, and 128 added to all but the last."""
    code = bytearray()
    while number > 0x7F:
        code.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*code, number))


def peek(message: bytes) -> tuple[bytes, Key]:
    """Returns the header's fingerprint and key without a check. Raises MessageError if the message is too short."""
    if len(message) < OVERHEAD:
        raise MessageError(f"a message has at least {OVERHEAD} bytes, this one {len(message)}")
    _, _, _, fingerprint, seed, round_, client, _ = _HEADER.unpack_from(message)
    return fingerprint, Key(seed, round_, client)


def unpack(message: bytes, fingerprint: bytes, key: Key) -> "Reader":
    """Returns a reader of the body. Raises MessageError unless the whole frame is as expected."""
    found, of = peek(message)
    magic, version, reserved, _, _, _, _, size = _HEADER.unpack_from(message)
    if magic != _MAGIC:
        raise MessageError(f"a message begins with {_MAGIC!r}, this one with {magic!r}")
    if version != VERSION or reserved:
        raise MessageError(f"the message has format version {version}.{reserved}, this program reads {VERSION}.0")
    if size != len(message) - OVERHEAD:
        raise MessageError(f"the header says {size} bytes of body, the message has {len(message) - OVERHEAD}")
    (checksum,) = _CHECKSUM.unpack_from(message, len(message) - _CHECKSUM.size)
    if checksum != _crc32()(memoryview(message)[: -_CHECKSUM.size]):
        raise MessageError("the checksum does not fit: the message was damaged on its way")
    if found != fingerprint:
        raise SchemaMismatch(
            f"the message has schema {found.hex()}, expected {fingerprint.hex()}: "
            "the two sides differ in model, encoder, reference or version"
        )
    if of[:3] != key[:3]:
        raise MessageError(
            f"the message is of seed {of.seed}, round {of.round}, client {of.client}; "
            f"expected seed {key.seed}, round {key.round}, client {key.client}"
        )
    return Reader(memoryview(message)[_HEADER.size : -_CHECKSUM.size])


def repacked(message: bytes, key: Key, ending: bytes = b"") -> bytes:
    """Returns a forged message with a right checksum: the body of `message` under `key`.

    ending: Replaces the last bytes of the body.
    """
    body = message[_HEADER.size : -_CHECKSUM.size - len(ending)] + ending
    return pack([body], peek(message)[0], key)


@dataclass
class Reader:
    """Reads the bytes of a body in order, never past its end.

    left: The bytes that are not read yet.
    """

    left: memoryview

    def read(self, size: int) -> memoryview:
        """Returns the next `size` bytes. Raises ValueError if fewer are left."""
        if size > len(self.left):
            raise ValueError(f"{size} bytes expected, {len(self.left)} left")
        head, self.left = self.left[:size], self.left[size:]
        return head

    def read_varint(self) -> int:
        """Returns the number that `varint` wrote. Raises ValueError for bytes that `varint` never writes."""
        value, place = 0, 0
        while True:
            (byte,) = self.read(1)
            value |= (byte & 0x7F) << place
            place += 7
            if byte < 0x80:
                break
            if place == 63:
                raise ValueError("a length has more than 63 bits")
        if not byte and place > 7:
            raise ValueError("a length has zeros at its end")
        return value
