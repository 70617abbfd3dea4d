"""Why a client is left out of a round."""

from typing import Literal, get_args

FailureKind = Literal["silent", "late", "refused", "outlier", "unable"]
"""silent: no answer came. late: it came beyond the deadline. refused: its bytes are no message of this round. outlier:
its update's norm is far out of line. unable: it has no examples, an error came up in its training, or its update cannot
be encoded."""

FAILURES: tuple[FailureKind, ...] = get_args(FailureKind)


class ClientFailure(Exception):
    """A client cannot take part in this round; says why."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
