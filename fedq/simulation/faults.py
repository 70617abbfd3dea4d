"""Faults of clients, drawn from keys."""

from dataclasses import dataclass, fields, replace

import numpy as np

from fedq.data import Client, Examples
from fedq.encoding import Key
from fedq.encoding.message import repacked
from fedq.errors import check_range
from fedq.learning import ClientFailure


@dataclass(frozen=True)
class Faults:
    """Probabilities that a client fails in a round. A client fails in one way at most, so their sum is at most 1.

    Time is not simulated. Late clients are drawn like the other faults, so that a run can be repeated.

    absent: the client never starts.
    crash: the client trains, and fails before it sends its message.
    late: the client sends its message, and the message comes after the deadline.
    nan: the client sends a valid message that ends in a NaN, as an exact float32 or in an entropy coder's last bytes.
    damaged: bits of the message flip, its end is lost, or bytes are added.
    replayed: the client sends the message of another round.
    """

    absent: float = 0.0
    crash: float = 0.0
    late: float = 0.0
    nan: float = 0.0
    damaged: float = 0.0
    replayed: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_range(field.name, getattr(self, field.name), 0, 1)
        if sum(getattr(self, field.name) for field in fields(self)) > 1 + 1e-9:
            raise ValueError("the probabilities of all faults must add up to no more than 1")

    def drawn(self, key: Key) -> str | None:
        """Returns the name of the fault of the client and the round in `key`, None for no fault."""
        uniform = float(key.fold("fault").bits(1, 64)[0]) / 2**64
        for field in fields(self):
            uniform -= getattr(self, field.name)
            if uniform < 0:
                return field.name
        return None

    def client(self, client: Client, key: Key) -> Client:
        """Returns the client in the round of `key`: an absent client fails to load."""
        return replace(client, load=_absent) if self.drawn(key) == "absent" else client

    def uplink(self, message: bytes, key: Key) -> bytes:
        """Returns the bytes that the server receives for a client's message.

        Raises ClientFailure if no message arrives.
        """
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
    """Flips one to eight bits of a message, cuts off its end, or adds bytes."""
    kind = generator.integers(3)
    if kind == 0:
        return message[: generator.integers(len(message))]
    if kind == 1:
        return message + generator.bytes(int(generator.integers(1, 100)))
    flipped = np.frombuffer(bytearray(message), np.uint8)
    for place in generator.choice(8 * len(message), generator.integers(1, 9), replace=False):
        flipped[place // 8] ^= 1 << (place % 8)
    return flipped.tobytes()
