"""Simulates a run: draws cohorts, trains clients in threads and ranks, saves checkpoints, and runs sweeps."""
