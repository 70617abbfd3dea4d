"""What goes wrong with clients, drawn from keys."""

from dataclasses import dataclass, fields, replace

import numpy as np

from fedq.data import Client, Examples
from fedq.encoding import Key
from fedq.encoding.message import repacked
from fedq.learning import ClientFailure


@dataclass(frozen=True)
class Faults:
    """Probabilities that a client fails in a round, one way at most; together they are at most 1.

    absent: it never starts. crash: it trains, and dies before it sends. late: its message, though sent, comes after
    the deadline. nan: it sends a message, right in form, that ends in a NaN,
    as an exact float32 or where an entropy coder's bytes end. damaged: bits of its message flip on the
    way, its end is lost, or more comes behind it. replayed: it sends another round's message. Time is not simulated:
    who is late is drawn like the rest, so that a run can be repeated.
    """

    absent: float = 0.0
    crash: float = 0.0
    late: float = 0.0
    nan: float = 0.0
    damaged: float = 0.0
    replayed: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise ValueError(f"{field.name} must be from 0 to 1, not {getattr(self, field.name)}")
        if sum(getattr(self, field.name) for field in fields(self)) > 1 + 1e-9:
            raise ValueError("the probabilities of all faults must add up to no more than 1")

    def drawn(self, key: Key) -> str | None:
        """Returns the name of what goes wrong with the client, in the round, of `key`; None if nothing does."""
        uniform = float(key.fold("fault").bits(1, 64)[0]) / 2**64
        for field in fields(self):
            uniform -= getattr(self, field.name)
            if uniform < 0:
                return field.name
        return None

    def client(self, client: Client, key: Key) -> Client:
        """Returns the client as it is in the round of `key`: one that is absent fails to load."""
        return replace(client, load=_absent) if self.drawn(key) == "absent" else client

    def uplink(self, message: bytes, key: Key) -> bytes:
        """Returns what the server receives of a client's message; raises ClientFailure where that is nothing."""
        match self.drawn(key):
            case "crash":
                raise ClientFailure("silent", "it crashed before it sent its update")
            case "late":
                raise ClientFailure("late", "its message came after the deadline")
            case "nan":
                return repacked(message, key, ending=np.full(1, np.nan, "<f4").tobytes())
            case "damaged":
                return _damaged(message, key.fold("damage").generator())
            case "replayed":
                return repacked(message, key._replace(round=key.round - 1 if key.round else 1))
        return message


def _absent() -> Examples:
    raise ClientFailure("silent", "it was absent")


def _damaged(message: bytes, generator: np.random.Generator) -> bytes:
    """Flips one to eight bits, cuts the end off, or adds to it."""
    kind = generator.integers(3)
    if kind == 0:
        return message[: generator.integers(len(message))]
    if kind == 1:
        return message + generator.bytes(int(generator.integers(1, 100)))
    flipped = np.frombuffer(bytearray(message), np.uint8)
    for place in generator.choice(8 * len(message), generator.integers(1, 9), replace=False):
        flipped[place // 8] ^= 1 << (place % 8)
    return flipped.tobytes()
