"""Trains the default run uncompressed, and saves updates and how far the weights moved.

python -m experiments.tensors.tensors [--output outputs/tensors.npz]

Writes float32 tensors as STATE/NAME (for example "round5/dense1.weight"). The states:

round5, round15       update (trained − received) of the cohort's first client, after 5 and 15 rounds
weights5, weights15   the server's weights after 5 and 15 rounds − its initial weights

On one machine the file is the same each time. `load` reads one state.
"""

import argparse
from pathlib import Path

import numpy as np

TENSORS = Path("outputs/tensors.npz")
ROUNDS = (5, 15)
STATES = ("round5", "round15", "weights15")  # NNCodec encoded these; nncodec/own.py encodes weights5 too


def train() -> dict[str, np.ndarray]:
    """Returns the tensors of all states, float32, by STATE/NAME."""
    # not at the top: environments of peers lack these packages, but import this file
    import torch
    from hydra import compose, initialize_config_dir

    from fedq.config import build, build_run
    from fedq.encoding import Key
    from fedq.learning import FederatedAveraging
    from fedq.learning.local_training import update_of
    from fedq.simulation.loop import cohort, rounds
    from fedq.simulation.workers import Workers
    from fedq.train import CONF

    torch.set_num_threads(1)
    last = max(ROUNDS)
    overrides = ["encoder=float32", f"run.rounds={last}", f"run.evaluate_every={last}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides)
    run, dataset, training = build_run(cfg), build(cfg, "dataset"), build(cfg, "client")
    model = build(cfg, "model", num_classes=dataset.num_classes)
    network = model().to(memory_format=torch.channels_last)  # the layout in training
    kept = {}
    with Workers() as workers:
        process = FederatedAveraging(model, training, build(cfg, "server"), seed=run.seed, map=workers.map)
        initial = process.initialize()
        for state, metrics in rounds(process, initial, dataset, run):
            accuracy = metrics.get("test/accuracy")
            if state.round in ROUNDS:
                client = int(cohort(run.seed, state.attempt, dataset.num_clients, run.clients_per_round)[0])
                key = Key(run.seed, state.attempt, client).fold("train")
                training.train(network, state.weights, dataset.client(client).load(), key)
                for name, value in update_of(network.state_dict(), state.weights).items():
                    kept[f"round{state.round}/{name}"] = value.numpy().copy(order="C")
                    moved = state.weights[name] - initial.weights[name]
                    kept[f"weights{state.round}/{name}"] = moved.numpy().copy(order="C")
    print(f"test accuracy after {last} rounds: {accuracy:.3f}")
    return kept


def load(path: Path, state: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a state by name, in the model's order; needs only numpy."""
    with np.load(path, allow_pickle=False) as file:
        return {name.removeprefix(f"{state}/"): file[name] for name in file.files if name.startswith(f"{state}/")}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=TENSORS, metavar="TENSORS.npz")
    output: Path = parser.parse_args().output
    kept = train()
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(output, **kept)  # type: ignore[arg-type]  # names may be any but "file"
    for name, value in kept.items():
        print(f"{name:28} {value.dtype} {value.shape!s:20} standard deviation {value.std():.3g}")


if __name__ == "__main__":
    main()
