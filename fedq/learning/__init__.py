"""The algorithm as pure steps: initialize() → state, next(state, clients) → state, metrics."""

from fedq.learning.evaluation import evaluate
from fedq.learning.failures import ClientFailure
from fedq.learning.federated_averaging import Diverged, FederatedAveraging, TooFewClients
from fedq.learning.local_training import LocalTraining, TrainingMetrics
from fedq.learning.round import Contribution, Gather, Record, Share, Task
from fedq.learning.server import ServerState
from fedq.learning.submodel import FederatedDropout

__all__ = [
    "ClientFailure",
    "Contribution",
    "Diverged",
    "FederatedAveraging",
    "FederatedDropout",
    "Gather",
    "LocalTraining",
    "Record",
    "ServerState",
    "Share",
    "Task",
    "TooFewClients",
    "TrainingMetrics",
    "evaluate",
]
