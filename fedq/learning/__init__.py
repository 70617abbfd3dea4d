"""The algorithm as pure steps: initialize() → state, next(state, clients) → state, metrics."""

from fedq.learning.client import LocalTraining
from fedq.learning.evaluation import evaluate
from fedq.learning.federated_averaging import Diverged, FederatedAveraging, TooFewClients
from fedq.learning.server import ServerState

__all__ = ["Diverged", "FederatedAveraging", "LocalTraining", "ServerState", "TooFewClients", "evaluate"]
