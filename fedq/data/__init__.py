"""Federated datasets: a client's number gives its tensors.

The package does not import learning, encoding or simulation.
"""

from fedq.data.dataset import Client, Examples, FederatedDataset
from fedq.data.partitioned import Partitioned

__all__ = ["Client", "Examples", "FederatedDataset", "Partitioned"]
