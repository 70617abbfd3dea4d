"""Why a client is left out of a round."""

from typing import Literal, get_args

from fedq.errors import FedqError
from fedq.learning.state import ServerState

FailureKind = Literal["silent", "late", "refused", "outlier", "unable", "lost"]
"""silent: no answer came.
late: The answer came after the deadline.
refused: The answer's bytes are damaged, or not of this round and client.
outlier: The update's norm is far out of line.
unable: The client has no examples, its training raised an error, or its update cannot be encoded.
lost: The client does not hold the weights that the broadcast builds on; the server sends them whole next time.
"""

FAILURES: tuple[FailureKind, ...] = get_args(FailureKind)


class ClientFailure(Exception):
    """A client cannot take part in this round; says why."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def unable(error: Exception) -> ClientFailure:
    """Returns the failure of a client whose dataset or model raised `error`, with the first line of its text."""
    first = str(error).partition("\n")[0]
    return ClientFailure("unable", f"{type(error).__name__}: {first}")


class OtherBase(ClientFailure):
    """The client's frozen tensors or first weights may differ from the server's.

    The server then sends its tensors, exact, before the same messages.
    """


class SharedDraw(FedqError):
    """Something has drawn from a generator that all threads share; names the generator."""


class Diverged(FedqError):
    """The server's weights hold NaN or infinity and cannot be sent; names the tensor."""


class TooFewClients(FedqError):
    """Fewer clients than required sent a usable update; says how many, and why the first did not.

    state: The state to continue from: as before the round, with this cohort's bits counted, and with other keys.
    counts: The metrics of the cohort that add up over cohorts: failures, uploads, seconds.
    """

    def __init__(self, text: str, state: ServerState, counts: dict[str, float]) -> None:
        super().__init__(text)
        self.state, self.counts = state, counts
