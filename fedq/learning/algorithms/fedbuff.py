"""FedBuff: the server takes a step whenever its buffer of answers is full, and never waits for slow clients."""

from dataclasses import dataclass

from typing_extensions import override

from fedq.learning.algorithm import FedAvg


@dataclass(frozen=True)
class FedBuff(FedAvg):
    """FedBuff (Nguyen 2022, algorithm 1): clients answer at their own speed.

    An answer builds on the weights that the client received. As soon as a client has answered, the server sends its
    weights to another client. After `run.clients_per_round` answers, the size of the buffer, the server takes a step.
    The *staleness* of an answer is the number of steps since the client received its weights. The update is multiplied
    by (1 + staleness)^-damping. The mean is divided by the clients' full weights, so that stale answers make a step
    shorter.

    concurrency: The number of clients that train at the same time.
    damping: The exponent of the staleness weights; 0.5 in the paper, and 0 for equal weights.
    """

    concurrency: int = 20
    damping: float = 0.5

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, not {self.concurrency}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be 0 or more, not {self.damping}")

    @property
    @override
    def sums_updates(self) -> bool:
        # the answers in one sum belong to several broadcasts, so encoded answers do not add up
        return False

    def scale(self, staleness: int) -> float:
        """Returns the factor of an update."""
        return float((1 + staleness) ** -self.damping)
