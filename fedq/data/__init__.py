"""Federated datasets: client numbers → tensors. Knows nothing of learning, encoding or the simulation."""

from fedq.data.dataset import Client, Examples, FederatedDataset

__all__ = ["Client", "Examples", "FederatedDataset"]
