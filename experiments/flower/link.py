"""Bytes on a link between two hosts, by the kernel's counters, against fedq's own count.

The hosts are network namespaces, joined by a veth pair. One host runs the SuperLink, and the other host runs three
SuperNodes. Each run's weights are compared with those of `python -m fedq.train`. Needs root and iproute2.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from experiments.flower.deployment import REPOSITORY, Deployment
from experiments.tables import show
from fedq.integrations.flower.__main__ import new
from fedq.simulation.checkpoint import load

HEADERS = 66
"""Bytes of the headers of a packet: Ethernet 14, IPv4 20, TCP 20 and its timestamps 12."""

SETTINGS = ["dataset=mnist5k", "dataset.clients=3", "run.clients_per_round=3", "client.steps=1", "run.keep=1"]


class Counters(NamedTuple):
    """What the kernel has counted in one direction: bytes and packets on the link, and packets that were sent again."""

    link: int
    packets: int
    again: int

    def since(self, before: "Counters") -> "Counters":
        """Returns the difference from earlier counters."""
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))

    @property
    def payload(self) -> int:
        """The bytes of TCP's payload."""
        return self.link - HEADERS * self.packets


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@contextmanager
def two_hosts(small_packets: bool) -> Iterator[tuple[str, str]]:
    """Yields the names of two hosts at 10.123.46.1 and 10.123.46.2."""
    hosts = f"flower-a-{os.getpid()}", f"flower-b-{os.getpid()}"
    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", "flower-a", "netns", hosts[0], "type", "veth", "peer", "name", "flower-b", "netns", hosts[1])
        for i, (host, end) in enumerate(zip(hosts, ("flower-a", "flower-b"), strict=True), 1):
            ip("-n", host, "addr", "add", f"10.123.46.{i}/24", "dev", end)
            if small_packets:
                ip("-n", host, "link", "set", end, "gso_max_segs", "1")
            for device in (end, "lo"):
                ip("-n", host, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def counters(hosts: tuple[str, str]) -> dict[str, Counters]:
    """Returns the counters of both directions, each from the sending end of the link."""
    found = {}
    for way, host, end in zip(("down", "up"), hosts, ("flower-a", "flower-b"), strict=True):
        (link,) = json.loads(ip("-n", host, "-s", "-j", "link", "show", end))
        sent = link["stats64"]["tx"]
        names, values = (
            line.split() for line in ip("netns", "exec", host, "grep", "Tcp:", "/proc/net/snmp").splitlines()
        )
        found[way] = Counters(sent["bytes"], sent["packets"], int(values[names.index("RetransSegs")]))
    return found


def simulated(folder: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Returns the weights after the same rounds in one process."""
    command = [sys.executable, "-m", "fedq.train", *overrides, f"hydra.run.dir={folder}"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return load(max((folder / "checkpoints").glob("*.pt")))[0].weights


def main() -> None:
    """Prints a row for each encoder and direction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoders", nargs="+", default=["float32", "uint8", "frontier"], help="choices of encoder=")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each run")
    parser.add_argument("--folder", type=Path, help="for all files; default: a temporary folder")
    text = "packets of at most 1,500 bytes, as on a real link; on a busy machine many are lost and sent again"
    parser.add_argument("--small-packets", action="store_true", help=text)
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="flower-link-"))).resolve()
    columns = ("encoder", "way", "messages", "TCP payload", "above", "packets", "sent again", "seconds", "weights")
    table = Table(*columns)
    with two_hosts(arguments.small_packets) as hosts:
        at_link, at_nodes = (["ip", "netns", "exec", host] for host in hosts)
        with Deployment(folder, "10.123.46.1", at_link=at_link, at_nodes=at_nodes) as deployment:
            for number in range(3):
                deployment.node(number)
            for encoder in arguments.encoders:
                overrides = [*SETTINGS, f"encoder={encoder}", f"run.rounds={arguments.rounds}"]
                new(folder / encoder, overrides)
                before, started = counters(hosts), time.monotonic()
                log = deployment.run(folder / encoder, f'output="{folder / encoder}/out"', seconds=7200)
                seconds, after = time.monotonic() - started, counters(hosts)
                (run,) = (folder / encoder / "out").iterdir()
                metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
                assert metrics["round"] == arguments.rounds - 1, log
                ours = load(max((run / "checkpoints").glob("*.pt")))[0].weights
                theirs = simulated(folder / encoder / "simulated", overrides)
                equal = all(torch.equal(ours[name], value) for name, value in theirs.items())
                messages = {
                    "down": metrics["cumulative_broadcasted_bits"] // 8,
                    "up": (metrics["cumulative_aggregated_bits"] + metrics["cumulative_reported_bits"]) // 8,
                }
                for way, size in messages.items():
                    moved = after[way].since(before[way])
                    cells = [f"{size:,}", f"{moved.payload:,}", f"{100 * (moved.payload / size - 1):.2f} %"]
                    cells += [f"{moved.packets:,}", f"{moved.again:,}"]
                    table.add_row(encoder, way, *cells, f"{seconds:.0f}", "equal" if equal else "differ")
                print(f"{encoder}: done", flush=True)
                show(table)
            before = counters(hosts)
            time.sleep(60)
            for way, moved in counters(hosts).items():
                idle = moved.since(before[way]).payload / 60
                print(f"three nodes without a run: {idle:.0f} bytes of TCP payload a second {way}")


if __name__ == "__main__":
    main()
