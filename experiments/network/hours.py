"""Draws test accuracy over simulated hours, on three networks and for several encoders: the picture of README.md.

Each encoder trains once: no client is late, so that the network changes only the time. The codec speeds are those of
`python -m experiments.network.codec`. A phone is assumed to be four times slower.

python -m experiments.network.hours --output experiments/network/hours.png
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table
from torch import nn

from experiments.tables import show
from fedq.compare import MARKERS
from fedq.config import build, build_run
from fedq.learning.clock import Clock
from fedq.learning.round import ClientRecord
from fedq.simulation.loop import rounds
from fedq.simulation.network import Network
from fedq.simulation.run import assemble
from fedq.simulation.stopping import Stopping
from fedq.train import CONF

CODEC = {"float32": 812, "uint8": 355, "drive": 179, "frontier": 86}
"""Million parameters that one thread of an AMD EPYC decodes or encodes in a second."""
NETWORKS = {"mobile": 0.25, "broadband": 1.0, "data_centre": 1.0}
"""Networks, with the speed of the codec relative to CODEC."""


class SmallCNN(nn.Sequential):
    """Two convolutions of 5 × 5 with 8 and 16 filters, and a dense layer of 128 units: 105,194 parameters."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, num_classes)),
        )


Curve = list[tuple[float, float]]
"""Simulated hours and test accuracy after each evaluation."""


def curves(encoder: str, overrides: Sequence[str]) -> dict[str, Curve]:
    """Trains once with an encoder, and returns the curve on each network."""
    model = "model._target_=experiments.network.hours.SmallCNN"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        names = [*NETWORKS]
        cfg, *others = (compose("config", [f"encoder={encoder}", model, f"run/network={n}", *overrides]) for n in names)
    run, arrivals = build_run(cfg), list[dict[str, float]]()
    with ExitStack() as stack:
        process, dataset, clients = assemble(cfg, Stopping(), stack)
        clocks = {}
        for name, one in zip(names, (cfg, *others), strict=True):
            network: Network = build(one, "run.network")
            network = replace(network, codec=CODEC[encoder] * NETWORKS[name])
            clocks[name] = network.clock(process.protocol, dataset.test(), run.clients_per_round)

        def seconds(record: ClientRecord, examples: int) -> float:
            arrivals.append({name: clock.seconds(record, examples) for name, clock in clocks.items()})
            return 0.0

        process.cohort = replace(process.cohort, clock=Clock(seconds))
        found: dict[str, Curve] = {name: [] for name in clocks}
        total = dict.fromkeys(clocks, 0.0)
        for _, metrics in rounds(process, process.initialize(), dataset, run, clients):
            for name in clocks:
                total[name] += max(times[name] for times in arrivals)
                if "test/accuracy" in metrics:
                    found[name].append((total[name] / 3600, metrics["test/accuracy"]))
            arrivals.clear()
    return found


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Draws test accuracy over simulated hours on three networks.")
    parser.add_argument("--encoders", default=",".join(CODEC), help="default: %(default)s")
    parser.add_argument("--target", type=float, default=0.95, help="accuracy of the table (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="HOURS.png", help="the picture")
    parser.add_argument("overrides", nargs="*", help="keys of fedq.train, such as run.rounds=40")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figure = Figure(figsize=(11, 3.8), dpi=120, layout="constrained")
    panels = dict(zip(NETWORKS, figure.subplots(1, len(NETWORKS), sharey=True), strict=True))
    reached = {name: dict[str, str]() for name in NETWORKS}
    for i, encoder in enumerate(args.encoders.split(",")):
        for name, curve in curves(encoder, args.overrides).items():
            hours, accuracies = zip(*curve, strict=True)
            panels[name].plot(hours, accuracies, f"{MARKERS[i]}-", color=f"C{i}", ms=3, lw=1, label=encoder)
            done = next((3600 * hour for hour, accuracy in curve if accuracy >= args.target), None)
            reached[name][encoder] = f"{done:.3g}" if done else "–"
    for name, axes in panels.items():
        axes.set(title=f"run/network={name}", xlabel="simulated hours", xscale="log", ylim=(0.5, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.axhline(args.target, color="black", lw=0.8, ls=":")
        axes.grid(alpha=0.3)
    panels["mobile"].set_ylabel("test accuracy")
    panels["mobile"].legend()
    figure.savefig(args.output)
    table = Table(f"simulated seconds to {args.target:.0%}", *args.encoders.split(","))
    for name, row in reached.items():
        table.add_row(name, *row.values())
    show(table)


if __name__ == "__main__":
    main()
