"""The frame on the wire: written, checked, refused.

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
    44 + n     4  CRC-32 (ISO/IEC 8802-3, as in zlib) of all before it

The checksum finds accidents, not forgery: every part of the body is checked again where it is decoded.
"""

import struct
import zlib
from collections.abc import Sequence

from fedq.errors import FedqError
from fedq.keys import Key

VERSION = 4
OVERHEAD = 48
"""Bytes of a message that are not body."""

_HEADER = struct.Struct("<4sHH8sQIQQ")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"FEDQ"


class MessageError(FedqError, ValueError):
    """The bytes are not a message that this schema and key could have produced; says why."""


def pack(parts: Sequence[bytes | memoryview], fingerprint: bytes, key: Key) -> bytes:
    """Returns the message whose body is `parts` back to back. `fingerprint` has 8 bytes."""
    size = sum(memoryview(part).nbytes for part in parts)
    header = _HEADER.pack(_MAGIC, VERSION, 0, fingerprint, key.seed, key.round, key.client, size)
    checksum = zlib.crc32(header)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((header, *parts, _CHECKSUM.pack(checksum)))


def length(number: int) -> bytes:
    """Returns `number` (0 … 2^63 − 1) in bytes of 7 bits, lowest first, each with 128 added but the last (LEB128)."""
    code = bytearray()
    while number > 0x7F:
        code.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*code, number))


def unpack(message: bytes, fingerprint: bytes, key: Key) -> "Reader":
    """Returns a reader of the body, once the whole frame is as expected; else raises MessageError."""
    if len(message) < OVERHEAD:
        raise MessageError(f"a message has at least {OVERHEAD} bytes, this one {len(message)}")
    magic, version, reserved, found, seed, round_, client, size = _HEADER.unpack_from(message)
    if magic != _MAGIC:
        raise MessageError(f"a message begins with {_MAGIC!r}, this one with {magic!r}")
    if version != VERSION or reserved:
        raise MessageError(f"the message has format version {version}.{reserved}, this program reads {VERSION}.0")
    if size != len(message) - OVERHEAD:
        raise MessageError(f"the header tells of {size} bytes of body, there are {len(message) - OVERHEAD}")
    (checksum,) = _CHECKSUM.unpack_from(message, len(message) - _CHECKSUM.size)
    if checksum != zlib.crc32(memoryview(message)[: -_CHECKSUM.size]):
        raise MessageError("the checksum does not fit: the message was damaged on its way")
    if found != fingerprint:
        raise MessageError(
            f"the message has schema {found.hex()}, expected {fingerprint.hex()}: "
            "the two sides differ in model, encoder, reference or version"
        )
    if (seed, round_, client) != (key.seed, key.round, key.client):
        raise MessageError(
            f"the message is of seed {seed}, round {round_}, client {client}; "
            f"expected seed {key.seed}, round {key.round}, client {key.client}"
        )
    return Reader(memoryview(message)[_HEADER.size : -_CHECKSUM.size])


def repacked(message: bytes, key: Key, ending: bytes = b"") -> bytes:
    """Returns `message` as if it were of `key` and its body ended in `ending`, with a checksum that fits: a forgery."""
    fingerprint = _HEADER.unpack_from(message)[3]
    body = message[_HEADER.size : -_CHECKSUM.size - len(ending)] + ending
    return pack([body], fingerprint, key)


class Reader:
    """Hands out the bytes of a body in order and never past its end."""

    def __init__(self, body: memoryview) -> None:
        self._body = body

    def read(self, size: int) -> memoryview:
        """Returns the next `size` bytes; raises ValueError where fewer are left."""
        if size > len(self._body):
            raise ValueError(f"{size} bytes expected, {len(self._body)} left")
        head, self._body = self._body[:size], self._body[size:]
        return head

    def read_length(self) -> int:
        """Returns the number that `length` wrote; raises ValueError where it did not."""
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

    def close(self) -> None:
        """Raises ValueError unless all was read."""
        if len(self._body):
            raise ValueError(f"{len(self._body)} bytes are left over")
