"""Keys: each random draw of a run follows from a key.

fedq never reads a global random state. A key holds the run's seed, the round, the client (or the broadcast) and the
names of the parts that draw. So a draw depends neither on the worker that makes it nor on earlier draws. Server and
client derive the same draws from the same key, and need not send them.
"""

import hashlib
import struct
from typing import Literal, NamedTuple

import numpy as np

BROADCAST = 2**64 - 1
"""The client number in the key of a broadcast."""


class Key(NamedTuple):
    """Names one stream of random bits. Equal keys give equal streams on every machine.

    The stream is numpy's SFC64 bit generator, seeded by a BLAKE2b hash of the key. numpy never changes the raw stream
    of a bit generator (NEP 19, 2018). `bits`, `permutation` and `integer` read the raw stream: their draws are the
    same with every version of numpy. Only `generator` depends on the version.

    Attributes:
        seed: The run's seed, 0 to 2^64 − 1.
        round: The number of the round, 0 to 2^64 − 1.
        client: The number of the client, or BROADCAST.
        path: The names of the parts that draw, outermost first.
    """

    seed: int
    round: int = 0
    client: int = BROADCAST
    path: tuple[str, ...] = ()

    def fold(self, name: str) -> "Key":
        """Returns the key of the part `name`."""
        return self._replace(path=(*self.path, name))

    def bit_generator(self) -> np.random.SFC64:
        """Returns a new bit generator at the start of the stream. Raises ValueError or struct.error from 2^64 on."""
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")
        head = struct.pack("<QQQ", self.seed, self.round, self.client)
        names = b"".join(struct.pack("<I", len(b)) + b for b in (name.encode() for name in self.path))
        digest = hashlib.blake2b(head + names, digest_size=16).digest()
        return np.random.SFC64(np.random.SeedSequence(int.from_bytes(digest, "little")))

    def shared(self) -> "Key":
        """Returns the broadcast's key of the same round and part, from which all clients draw the same numbers."""
        return self._replace(client=BROADCAST)

    def bits(self, n: int, width: Literal[8, 16, 32, 64]) -> np.ndarray:
        """Returns n unsigned integers of `width` random bits each, shape (n,).

        The bits are consecutive bits of the raw stream, least significant first, on every machine.
        """
        words = self.bit_generator().random_raw(-(-n * width // 64))
        return words.astype("<u8", copy=False).view(f"<u{width // 8}")[:n]

    def generator(self) -> np.random.Generator:
        """Returns a numpy generator, for draws that one side alone makes (data, sampling).

        Its draws depend on the version of numpy, which may change the methods of Generator (NEP 19). Equal runs
        therefore need equal versions of numpy and torch, and processors of one kind.
        """
        return np.random.Generator(self.bit_generator())

    def permutation(self, n: int) -> np.ndarray:
        """Returns a uniformly random order of 0 … n−1 (int64, shape (n,))."""
        return np.argsort(self.bit_generator().random_raw(n), kind="stable")

    def integer(self) -> int:
        """Returns one integer below 2⁶³, for example to seed another library's generator."""
        return int(self.bit_generator().random_raw()) >> 1
