"""What makes the algorithm run: sampler, workers, the loop, checkpoints."""
