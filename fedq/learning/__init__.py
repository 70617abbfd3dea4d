"""The algorithm as pure steps: initialize() → state, next(state, clients) → state, metrics."""

from fedq.learning.algorithm import FedAvg
from fedq.learning.algorithms import FedBuff, FedNova, FlexLoRA, RoLoRA, Scaffold
from fedq.learning.error_feedback import ErrorFeedback
from fedq.learning.evaluation import evaluate
from fedq.learning.failures import ClientFailure, Diverged, TooFewClients
from fedq.learning.federated_averaging import FederatedAveraging
from fedq.learning.local_training import LocalTraining, TrainingMetrics
from fedq.learning.round import Broadcast, ClientRecord, CohortResult, Gather, Registered, Summand
from fedq.learning.state import ServerState
from fedq.learning.submodel import FederatedDropout
from fedq.learning.task import Classification, Task, TaskError
from fedq.learning.tasks import Multilabel, NextToken, Regression

__all__ = [
    "Broadcast",
    "Classification",
    "ClientFailure",
    "ClientRecord",
    "CohortResult",
    "Diverged",
    "ErrorFeedback",
    "FedAvg",
    "FedBuff",
    "FedNova",
    "FederatedAveraging",
    "FederatedDropout",
    "FlexLoRA",
    "Gather",
    "LocalTraining",
    "Multilabel",
    "NextToken",
    "Registered",
    "Regression",
    "RoLoRA",
    "Scaffold",
    "ServerState",
    "Summand",
    "Task",
    "TaskError",
    "TooFewClients",
    "TrainingMetrics",
    "evaluate",
]
