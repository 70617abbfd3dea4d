"""Simulated links and processors of clients: the time that a round takes on a network."""

import csv
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedq.data import Examples
from fedq.encoding import Key
from fedq.errors import FedqError, check_range
from fedq.learning.clock import Clock
from fedq.learning.draws import seeded
from fedq.learning.evaluation import check
from fedq.learning.protocol import Protocol
from fedq.learning.round import ClientRecord
from fedq.learning.task import Task, outputs_of

_CENTURY = 100 * 365.25 * 86_400  # seconds: sums over rounds stay within what a checkpoint holds


class Link(NamedTuple):
    """A client's link and processor.

    down: The rate of downloads, in Mbit/s.
    up: The rate of uploads, in Mbit/s.
    latency: The round-trip time, in ms.
    compute: The speed of the client's processor, relative to the mean client.
    """

    down: float
    up: float
    latency: float
    compute: float


@dataclass(frozen=True)
class Network:
    """Links and processors of a class of clients, drawn from log-normal distributions with the given means.

    A client keeps its link over all rounds. One draw decides both rates, so that a slow link is slow both ways.

    down: The mean rate of downloads, in Mbit/s.
    up: The mean rate of uploads, in Mbit/s.
    latency: The mean round-trip time, in ms.
    link_spread: The standard deviation of the logarithm of a rate, and of the logarithm of a latency.
    compute: The mean client's speed in training, in GFLOP/s.
    compute_spread: The standard deviation of the logarithm of a client's speed.
    codec: The millions of parameters that the mean client decodes, or encodes, in a second.
    deadline: The seconds after which a round ends, without clients that have not answered; None to wait for all.
    over_selection: The number of clients that a round asks beyond `clients_per_round`. The round ends with the first
        `clients_per_round` answers.
    trace: A CSV file with a header and the columns down, up, latency and compute, in the units of `Link`. Client i has
        row i modulo the number of rows. None to draw the links.
    """

    down: float
    up: float
    latency: float
    link_spread: float
    compute: float
    compute_spread: float
    codec: float
    deadline: float | None = None
    over_selection: int = 0
    trace: str | None = None

    def __post_init__(self) -> None:
        for name in ("down", "up", "compute", "codec", "deadline"):
            check_range(name, getattr(self, name), above=0, optional=name == "deadline")
        check_range("latency", self.latency, 0)
        for name in ("link_spread", "compute_spread"):  # larger spreads give rates of 0
            check_range(name, getattr(self, name), 0, 10)
        check_range("over_selection", self.over_selection, 0, integer=True)
        if self.trace:
            self._rows  # noqa: B018  reads the file now, so that an error comes before the first round

    def link(self, client: int, seed: int) -> Link:
        """Returns a client's link. `seed` is the run's seed."""
        if self.trace:
            return self._rows[client % len(self._rows)]
        key = Key(seed, client=client).fold("network")
        rate = _factor(key.fold("rate"), self.link_spread)
        latency = self.latency * _factor(key.fold("latency"), self.link_spread)
        return Link(self.down * rate, self.up * rate, latency, _factor(key.fold("compute"), self.compute_spread))

    @cached_property
    def _rows(self) -> Sequence[Link]:
        return _read(Path(self.trace or ""))

    def clock(self, protocol: Protocol, examples: Examples, enough: int) -> Clock:
        """Returns the clock of a run.

        protocol: The run's protocol.
        examples: Some examples, from which the work in training is counted.
        enough: The run's `clients_per_round`.

        A client waits one round trip for the first byte of its download, downloads, decodes, trains, encodes, and
        uploads after another round trip. The server needs no time, and its own link is never full.
        """
        work = operations(protocol.client_model, protocol.task, examples) / (self.compute * 1e9)
        elements = sum(spec.numel for group in protocol.groups.values() for spec in group.schema.values())

        def seconds(record: ClientRecord, examples: int) -> float:
            link = self.link(record.client, protocol.seed)
            sent = record.bits + record.report_bits
            coded = elements / (self.codec * 1e6) * (2 if sent else 1)
            computing = (protocol.training.seen(examples) * work + coded) / link.compute
            download, upload = record.broadcast_bits / (link.down * 1e6), sent / (link.up * 1e6)
            total = 2 * link.latency / 1e3 + download + computing + upload
            if not total < _CENTURY:
                raise FedqError(
                    f"run.network: an answer of client {record.client} takes {total:.3g} seconds, more than a century: "
                    "give higher rates, or a lower latency"
                )
            return total

        return Clock(seconds, self.deadline or math.inf, enough if self.over_selection else None)


def _factor(key: Key, spread: float) -> float:
    """Returns a log-normal draw with mean 1; `spread` is the standard deviation of its logarithm."""
    uniform = (int(key.bits(1, 64)[0] >> 11) + 0.5) / 2**53
    return math.exp(spread * NormalDist().inv_cdf(uniform) - spread**2 / 2)


def _read(path: Path) -> list[Link]:
    """Returns the rows of a trace. Raises FedqError, naming the line, for a row that is not a link."""
    try:
        table = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
        numbered = [(table.line_num, row) for row in table]
    except (OSError, ValueError, csv.Error) as error:
        raise FedqError(f"run.network.trace: {path} cannot be read: {error}") from error
    if lacking := set(Link._fields) - set(table.fieldnames or ()):
        raise FedqError(f"run.network.trace: {path} has no column {min(lacking)!r}; it needs {', '.join(Link._fields)}")
    rows = []
    for line, row in numbered:
        try:
            link = Link(*(float(row[name]) for name in Link._fields))
        except (TypeError, ValueError):
            link = Link(0, 0, 0, 0)
        if not (min(link.down, link.up, link.compute) > 0 <= link.latency and all(map(math.isfinite, link))):
            raise FedqError(
                f"run.network.trace: {path}, line {line}: down, up and compute must be finite numbers above "
                "0, and latency 0 or more"
            )
        rows.append(link)
    if not rows:
        raise FedqError(f"run.network.trace: {path} has no row below its header")
    return rows


def operations(model: nn.Module, task: Task, examples: Examples) -> float:
    """Returns the floating-point operations that training takes for an example, forward and backward.

    torch.utils.flop_counter counts matrix products and convolutions; a multiplication with its addition counts as two.

    model: The network, which stays as it is.
    task: The task.
    examples: At least one example.

    Raises TaskError if the examples do not fit the model and the task. Raises FedqError without examples.
    """
    device = next(model.parameters()).device
    check(model, "the test set", examples, task)
    if not len(examples.y):
        raise FedqError("run.network needs a test set with an example, from which it counts the work in training")
    x, y = (part[[0, -1]].to(device) for part in examples)  # two examples, because batch norm refuses one
    model = deepcopy(model).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # the counter does not know oneDNN's recurrent layers
    try:
        with seeded(Key(0).fold("operations"), device), FlopCounterMode(display=False) as counter:
            torch.autograd.grad(task.loss(outputs_of(model(x)), y), parameters, allow_unused=True)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    return float(counter.get_total_flops()) / len(y)
