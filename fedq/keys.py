"""Keys: where every random draw of a run comes from.

Nothing in fedq reads a global random state. Each draw belongs to a key (run seed, round, client or
broadcast) that is folded by name down to its use, so that it does not depend on which worker draws it,
when, or after what. Server and client can derive the same draw from the same key, which costs no bytes.
"""

import hashlib
import struct
from typing import Literal, NamedTuple

import numpy as np

BROADCAST = 2**64 - 1
"""The client number of what the server sends to the whole cohort."""


class Key(NamedTuple):
    """Names one stream of random bits; equal keys give equal streams on every machine.

    The stream is numpy's SFC64 bit generator seeded from a BLAKE2b hash of the key. numpy never changes
    the raw stream of a bit generator (NEP 19, 2018), and only raw draws are used by the methods here.
    """

    seed: int
    round: int = 0
    client: int = BROADCAST
    path: tuple[str, ...] = ()

    def fold(self, name: str) -> "Key":
        """Returns the key of the part called `name`."""
        return self._replace(path=(*self.path, name))

    def bit_generator(self) -> np.random.SFC64:
        """Returns a fresh bit generator at the start of this key's stream."""
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")
        head = struct.pack("<QQQ", self.seed, self.round, self.client)
        names = b"".join(struct.pack("<I", len(b)) + b for b in (name.encode() for name in self.path))
        digest = hashlib.blake2b(head + names, digest_size=16).digest()
        return np.random.SFC64(np.random.SeedSequence(int.from_bytes(digest, "little")))

    def shared(self) -> "Key":
        """Returns the same key for all clients of a round: what they draw from it, they draw alike."""
        return self._replace(client=BROADCAST)

    def bits(self, n: int, width: Literal[8, 16, 32, 64]) -> np.ndarray:
        """Returns n unsigned integers of `width` random bits each (shape (n,)): both sides of the wire agree on them.

        They are consecutive bits of the raw stream, least significant first, on every machine and for every device.
        """
        words = self.bit_generator().random_raw(-(-n * width // 64))
        return words.astype("<u8", copy=False).view(f"<u{width // 8}")[:n]

    def generator(self) -> np.random.Generator:
        """Returns a numpy generator, for draws that only one side ever makes (data, sampling)."""
        return np.random.Generator(self.bit_generator())

    def permutation(self, n: int) -> np.ndarray:
        """Returns a uniformly random order of 0 … n−1 (int64, shape (n,))."""
        return np.argsort(self.bit_generator().random_raw(n), kind="stable")

    def integer(self) -> int:
        """Returns one integer below 2⁶³, a seed for a library's own generator."""
        return int(self.bit_generator().random_raw()) >> 1
