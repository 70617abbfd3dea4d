"""Sizes and label shares of a dataset's clients, and their picture."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedq.data.dataset import FederatedDataset
from fedq.data.download import DatasetError
from fedq.data.tokens import IGNORED
from fedq.keys import Key

if TYPE_CHECKING:  # matplotlib takes a second to load
    from matplotlib.axes import Axes

BARS = 30
"""Largest number of clients in the picture."""

COLOURS = 100
"""Largest number of labels with a colour in the picture; the other labels are grey."""

LEGEND = 20
"""Largest number of labels in the picture's legend, at equal distances."""


class Population(NamedTuple):
    """Sizes and labels of the clients that were read.

    numbers: the clients' numbers, (n,).
    sizes: the clients' numbers of examples, (n,).
    labels: how often each client has each label, (n, classes); None if the targets are not labels.
    shape: shape and dtype of an input, in words.
    """

    numbers: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None
    shape: str


def read_population(dataset: FederatedDataset, most: int = 1000) -> Population:
    """Reads the examples of all clients, or of `most` random clients, the same in each call.

    Targets of shape (N, T) count as N × T labels, without padding (0, or −100 with a pretrained tokenizer).
    Raises DatasetError if a label is out of range.
    """
    n, classes = dataset.num_clients, dataset.num_classes
    draw = Key(0).fold("population").generator()
    numbers = np.arange(n) if n <= most else np.sort(draw.choice(n, most, replace=False))
    sizes, labels, shape = [], [], ""
    for number in numbers.tolist():
        x, y = dataset.client(number).load()
        sizes.append(len(y))
        shape = f"{' × '.join(map(str, x.shape[1:])) or '1'}, {str(x.dtype).removeprefix('torch.')}"
        if not y.is_floating_point():
            known = y if y.dim() == 1 else y[(y != 0) & (y != IGNORED)]
            if len(known) and not 0 <= int(known.min()) <= int(known.max()) < classes:
                raise DatasetError(f"client {number} has labels outside 0 to {classes - 1}.")
            labels.append(np.bincount(known.flatten().numpy(), minlength=classes))
    return Population(numbers, np.array(sizes), np.stack(labels) if len(labels) == len(sizes) else None, shape)


def shares(counts: np.ndarray) -> np.ndarray:
    """Returns counts divided by the sum of their row; rows of zeros do not change."""
    result: np.ndarray = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return result


def distances(labels: np.ndarray) -> np.ndarray:
    """Returns the total variation distance of each client's label shares from the population's, (n,).

    The distance is half the sum of absolute differences: 0 for equal shares, near 1 for a client of rare labels only.
    """
    result: np.ndarray = np.abs(shares(labels) - shares(labels.sum(axis=0))).sum(axis=1) / 2
    return result


def draw(population: Population, title: str, path: Path) -> None:
    """Draws the label shares of some clients as bars, and the sizes of all as a histogram.

    population: sizes and labels of the clients.
    title: title of the picture.
    path: file to write; its suffix is the format.
    """
    from matplotlib.figure import Figure  # not pyplot, which may open a window
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    figure.suptitle(title)
    if population.labels is None:
        right = figure.subplots()
    else:
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        _draw_labels(left, population.numbers, population.labels)
    smallest, largest = int(population.sizes.min()), int(population.sizes.max())
    edges = np.linspace(smallest - 0.5, largest + 0.5, min(31, largest - smallest + 2))
    right.hist(population.sizes, bins=edges.tolist())
    right.set(xlabel="examples of a client", ylabel="clients")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    right.set_xlim(smallest - max(3, 0.02 * largest), largest + max(3, 0.02 * largest))
    figure.savefig(path)


def _draw_labels(axes: "Axes", numbers: np.ndarray, labels: np.ndarray) -> None:
    from matplotlib import colormaps

    chosen = np.unique(np.linspace(0, len(numbers) - 1, BARS).astype(int))
    common = np.argsort(-labels.sum(axis=0), kind="stable")
    named, heights = np.sort(common[:COLOURS]), shares(labels)[chosen]
    count = len(named)
    palette = colormaps["tab10" if count <= 10 else "tab20" if count <= 20 else "turbo"].resampled(max(count, 10))
    in_legend = np.linspace(0, count - 1, min(count, LEGEND)).astype(int).tolist()
    bottom = np.zeros(len(chosen))
    for i, label in enumerate(named):
        name = str(label) if i in in_legend else None
        axes.bar(range(len(chosen)), heights[:, label], bottom=bottom, width=0.9, color=palette(i), label=name)
        bottom += heights[:, label]
    if count < len(common):
        others = f"{len(common) - count:,} others"
        axes.bar(range(len(chosen)), 1 - bottom, bottom=bottom, width=0.9, color="lightgrey", label=others)
    axes.set_xticks(range(len(chosen)), [str(numbers[i]) for i in chosen], rotation=90, fontsize=7)
    axes.set(xlabel="client", ylabel="share of labels", ylim=(0, 1), xlim=(-0.6, len(chosen) - 0.4))
    axes.legend(title="label", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, reverse=True, frameon=False)
