"""Federated datasets: a client's number gives its tensors.

The package does not import learning, encoding or simulation.
"""

from fedq.data.dataset import Client, Examples, FederatedDataset

__all__ = ["Client", "Examples", "FederatedDataset"]
