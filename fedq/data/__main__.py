"""Prints and draws the labels and sizes of clients: python -m fedq.data cifar10 dataset/partition=shards.

The first argument is the choice of a dataset. Further arguments are settings as for fedq.train; only settings of the
dataset matter.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedq.config import build, check, explain
from fedq.data.population import Population, distances, draw, read_population, shares
from fedq.errors import FedqError
from fedq.tracking.console import stdout_console
from fedq.train import CONF

ROWS = 12
"""Largest number of labels in the table."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = ArgumentParser("python -m fedq.data", description="Prints and draws the labels and sizes of clients.")
    parser.add_argument("dataset", help="choice of the group dataset, such as mnist5k")
    parser.add_argument("settings", nargs="*", help="as for fedq.train, such as dataset.alpha=0.1")
    parser.add_argument("--config-dir", type=Path, help="folder with your files, as for fedq.train")
    parser.add_argument("--picture", type=Path, help="file of the picture; by default DATASET.png")
    given = parser.parse_intermixed_args(arguments)
    search = [f"hydra.searchpath=[file://{given.config_dir.absolute()}]"] if given.config_dir else []
    path = given.picture or Path(f"{given.dataset}.png")
    if given.config_dir and not given.config_dir.is_dir():
        sys.exit(f"fedq: --config-dir: {given.config_dir} is not a folder")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [f"dataset={given.dataset}", *given.settings, *search])
        check(cfg, given.settings)
        dataset = build(cfg, "dataset")
        population = read_population(dataset)
        show(population, dataset.num_clients, dataset.num_classes, len(dataset.test().y))
        shown = [setting for setting in given.settings if not setting.startswith("dataset.path=")]
        draw(population, " ".join((given.dataset, *shown)), path)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"fedq: {explain(error)}")
    except (FedqError, OSError) as error:
        sys.exit(f"fedq: {error}")
    print(f"picture: {path}")


def show(population: Population, clients: int, classes: int, test: int) -> None:
    """Prints a population in tables.

    population: sizes and labels of the clients that were read.
    clients: number of all clients.
    classes: number of outputs of a model.
    test: number of test examples.
    """
    console = stdout_console()
    sizes, labels = population.sizes, population.labels
    sample = "" if len(sizes) == clients else f" (drawn at random from {clients:,})"
    console.print(f"{len(sizes):,} clients{sample} with {sizes.sum():,} examples; {test:,} test examples")
    console.print(f"an input is {population.shape}; a model has {classes:,} outputs\n")
    quantiles = np.quantile(sizes, (0, 0.1, 0.5, 0.9, 1))
    names = ("smallest", "10 %", "median", "90 %", "largest", "mean")
    table = _table("examples of a client", *names)
    table.add_row("", *(f"{number:,.4g}" if number % 1 else f"{number:,.0f}" for number in (*quantiles, sizes.mean())))
    console.print(table, "")
    if labels is None:
        return
    overall, of_client, present = shares(labels.sum(axis=0)), shares(labels), labels > 0
    common = np.argsort(-overall, kind="stable")[:ROWS]
    table = _table("label", "share", "clients with the label", "largest share in a client")
    for label in np.sort(common):
        cells = (overall[label], present[:, label].mean(), of_client[:, label].max())
        table.add_row(str(label), *(f"{100 * cell:.1f} %" for cell in cells))
    if classes > ROWS:
        table.add_row(f"{classes - ROWS} others", f"{100 * (1 - overall[common].sum()):.1f} %", "", "")
    console.print(table, "")
    console.print(f"labels of a client: {present.sum(axis=1).mean():.1f} of {classes:,} on average")
    console.print(
        f"mean distance of a client's label shares from all clients' shares: {distances(labels).mean():.2f} of 1"
    )


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


if __name__ == "__main__":
    main()
