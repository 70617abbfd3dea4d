"""fedq: federated learning in PyTorch where every byte on the wire is real, counted, and as few as can be."""
