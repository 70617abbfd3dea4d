"""Ranks: processes that torchrun starts, on one machine or several, to share the clients of each cohort."""

import io
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from time import monotonic
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from fedq.data import Client
from fedq.errors import FedqError
from fedq.learning import Broadcast, ClientRecord, CohortResult, Summand, TrainingMetrics
from fedq.learning.cohort import Agree
from fedq.simulation.stopping import Stopping

log = logging.getLogger(__name__)

BEAT = 1.0
"""Seconds between two signs of life of a rank."""
PATIENCE = 15.0
"""Seconds without a sign of life after which a rank counts as lost."""
_FOREVER = timedelta(days=365)  # no limit: signs of life distinguish slow ranks from lost ranks

Contribute = Callable[[Broadcast, Iterable[tuple[int, Client]], Agree], CohortResult]


class RankLost(FedqError):
    """Another process of this run has ended or does not answer."""


def split(costs: Sequence[int], parts: int) -> list[int]:
    """Returns parts + 1 places that cut a row of clients into `parts` ranges of about equal cost.

    A range of neighbours adds up to few partial sums: at most two for each level of the tree.
    """
    ends = np.cumsum([0, *(max(cost, 1) for cost in costs)])
    targets = ends[-1] * np.arange(1, parts) / parts
    return [0, *(int(np.abs(ends - target).argmin()) for target in targets), len(costs)]


class Ranks:
    """One process of a run. Only rank 0 has the server's state and writes files.

    Rank 0 sends orders with `tell`, and the other ranks receive them with `listen`. In a round every rank trains its
    part of the cohort and adds up the results. Neighbouring ranks then add up their sums, pair by pair, until rank 0
    has the whole sum. The tree of sums is the same as in one process. Ranks send signs of life through torchrun's
    store. A rank ends if another rank is silent for PATIENCE seconds, or if a connection breaks.
    """

    def __init__(self, stopping: Stopping) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.stopping, self._ended = stopping, threading.Event()
        self.apart = False  # True if a round fails on rank 0 alone: the other ranks then wait in the round

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            # torchrun's store survives a restart, and this process must not read values of earlier processes
            prefix = f"fedq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            with self._connection():
                meeting = _store(prefix, 300)
                self._store = _store(prefix, PATIENCE)
                self._store.set(f"beat/{self.rank}", "0")
                dist.init_process_group(backend, store=meeting, rank=self.rank, world_size=self.size, timeout=_FOREVER)
                dist.barrier()
            self._heard = dict.fromkeys(range(1, self.size) if self.rank == 0 else [0], monotonic())
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._ended.set()
        if self.size > 1:
            for thread in self._threads:  # a thread inside torch at exit would abort the process
                thread.join(2 * BEAT)
            if not (kind and issubclass(kind, RankLost)):
                if self.rank == 0 and not self.apart:
                    self.tell({"end": True})
                dist.destroy_process_group()

    def tell(self, order: dict[str, Any]) -> None:
        """Sends an order of plain values and tensors to every other rank."""
        if self.size > 1:
            with self._connection():
                _put(order, partial(dist.broadcast, src=0))

    def listen(self) -> Iterator[dict[str, Any]]:
        """Yields rank 0's orders until rank 0 is done."""
        while True:
            with self._connection():
                order = _take(partial(dist.broadcast, src=0))
            if "end" in order:
                return
            yield order

    def gather(self, contribute: Contribute, broadcast: Broadcast, clients: Sequence[Client]) -> CohortResult:
        """Runs a round on all ranks, and returns its result.

        Rank 0 calls this method while the others call `contribute_to`.
        """
        bounds = split([client.examples for client in clients], self.size)
        sent = _with_each_message(broadcast, _as_tensor)
        self.apart = self.size > 1
        self.tell({"broadcast": sent, "numbers": [client.number for client in clients], "bounds": bounds})
        agree = partial(self._agree, len(clients))
        result = self._reduce(contribute(broadcast, list(enumerate(clients))[: bounds[1]], agree))
        self.apart = False
        return result

    def contribute_to(
        self,
        order: dict[str, Any],
        contribute: Contribute,
        clients: Callable[[int, Iterable[int]], list[Client]],
    ) -> None:
        """Does this rank's part of a round that `gather` started.

        `clients` returns clients of a round by their numbers.
        """
        first, last = order["bounds"][self.rank : self.rank + 2]
        broadcast = _with_each_message(order["broadcast"], lambda message: message.numpy().tobytes())
        mine = clients(broadcast.attempt, order["numbers"][first:last])
        self._reduce(contribute(broadcast, enumerate(mine, first), partial(self._agree, len(order["numbers"]))))

    def _agree(self, clients: int, arrivals: Mapping[int, float]) -> dict[int, float]:
        """Returns the arrivals of all `clients` of a cohort, of which each rank knows a part."""
        times = torch.zeros(clients, dtype=torch.float64)
        for place, time in arrivals.items():
            times[place] = time
        if self.size > 1:
            with self._connection():
                dist.all_reduce(times)
        return dict(enumerate(times.tolist()))

    def _reduce(self, result: CohortResult) -> CohortResult:
        """Adds up the results of neighbouring ranks, then of neighbouring pairs, and so on. Rank 0 gets the sum."""
        step = 1
        while step < self.size:
            with self._connection():
                if self.rank & step:
                    parts = (result.sums.partial_results(), result.records, result.seconds)
                    _put(parts, partial(dist.send, dst=self.rank - step))
                    break
                if self.rank + step < self.size:
                    sums, records, seconds = _take(partial(dist.recv, src=self.rank + step))
                    for level, place, summand in sums:
                        result.sums.add(place, summand, level)
                    result.records |= records
                    for phase, value in seconds.items():
                        result.seconds[phase] += value
            step *= 2
        return result

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.stopping.check()  # all ranks may have been asked to stop
            raise RankLost(f"rank {self.rank} lost the connection to another rank: {error}") from error

    def _beat(self) -> None:
        """Sends signs of life, and records the signs of rank 0 (on rank 0, of all other ranks)."""
        last = dict.fromkeys(self._heard, b"")
        with suppress(RuntimeError):  # the store is gone: no more signs of life
            for beats in count():
                self._store.set(f"beat/{self.rank}", str(beats))
                for rank in self._heard:
                    beat = self._store.get(f"beat/{rank}")
                    if beat != last[rank]:
                        last[rank], self._heard[rank] = beat, monotonic()
                if self._ended.wait(BEAT):
                    return

    def _watch(self) -> None:
        """Ends this process if a rank has sent no sign of life for too long."""
        # This is a separate thread, because the thread of `_beat` may wait in a broken connection for minutes.
        while not (silent := [rank for rank, since in self._heard.items() if monotonic() - since > PATIENCE]):
            if self._ended.wait(BEAT):
                return
        lost = f"rank {self.rank} has had no sign of life of rank {silent[0]} for {PATIENCE:.0f} seconds"
        self.stopping.request(RankLost(lost))  # ends the round after the current client
        if not self._ended.wait(PATIENCE / 3):
            log.error("%s: this process ends", lost)
            os._exit(1)


def launched_at(now: datetime) -> str | None:
    """Returns the time of the launch of this process as a name, which stays the same after restarts by torchrun.

    Returns None if torchrun did not start this process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name: bytes = _store("fedq", PATIENCE).compare_set("launched", "", now.strftime("%Y-%m-%d/%H-%M-%S-%f"))
    return name.decode()


def _store(prefix: str, patience: float) -> PrefixStore:
    """Returns a new connection to torchrun's store, with a prefix for keys and a timeout of `patience` seconds."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=patience)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return PrefixStore(prefix, TCPStore(address, port, timeout=timeout))
    # the cluster sets the variables without torchrun: rank 0 starts the store
    return PrefixStore(prefix, TCPStore(address, port, None, os.environ["RANK"] == "0", timeout, multi_tenant=True))


def _with_each_message(broadcast: Broadcast, convert: Callable[[Any], Any]) -> Broadcast:
    """Returns the broadcast with its messages converted: torch saves tensors faster than bytes."""
    messages, kept = ([*map(convert, part)] for part in (broadcast.messages, broadcast.kept))
    return Broadcast(
        broadcast.attempt, messages, broadcast.norm, convert(broadcast.all_at_once), kept, dict(broadcast.missed)
    )


def _as_tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def _put(value: Any, move: Callable[[Tensor], Any]) -> None:
    """Sends a value, with `move` for each tensor of bytes: the length, then the content."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    move(torch.tensor([buffer.tell()]))
    move(torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8))


def _take(move: Callable[[Tensor], Any]) -> Any:
    """Receives a value that another rank sends with `_put`. The bytes cannot run code."""
    length = torch.empty(1, dtype=torch.int64)
    move(length)
    data = torch.empty(int(length), dtype=torch.uint8)
    move(data)
    with torch.serialization.safe_globals([Broadcast, ClientRecord, Summand, TrainingMetrics]):
        return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
