"""Two hosts (network namespaces) joined by a cable, with torchrun on both. One host is cut off during a round."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from command import fedq
from test_train import SMALL, assert_same_run, run_folders

HOSTS = (f"fedq-a-{os.getpid()}", f"fedq-b-{os.getpid()}")  # several runs of this test may run at the same time
ADDRESS = "10.123.45.1"
COMMAND = (*SMALL, "run.rounds=40", "run.checkpoint_every=1", "encoder=hadamard")


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[None]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    for host in HOSTS:
        if ip("netns", "add", host).returncode:
            pytest.skip("no network namespace can be made here")
    try:
        ip("link", "add", "fedq-va", "netns", HOSTS[0], "type", "veth", "peer", "name", "fedq-vb", "netns", HOSTS[1])
        for i, (host, end) in enumerate(zip(HOSTS, ("fedq-va", "fedq-vb"), strict=True), 1):
            ip("-n", host, "addr", "add", f"10.123.45.{i}/24", "dev", end)
            for device in (end, "lo"):
                assert ip("-n", host, "link", "set", device, "up").returncode == 0
        yield
    finally:
        for host in HOSTS:
            ip("netns", "delete", host)


def start(folder: Path, port: int) -> list[subprocess.Popen]:
    """Starts the run on both hosts, each with a disk of its own."""
    started = []
    for i, (host, end) in enumerate(zip(HOSTS, ("fedq-va", "fedq-vb"), strict=True)):
        (folder / host).mkdir(exist_ok=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={i}"]
        torchrun += ["--nproc-per-node=1", f"--master-addr={ADDRESS}", f"--master-port={port}"]
        command = ["ip", "netns", "exec", host, *torchrun, "-m", "fedq.train", *COMMAND, f"hydra.run.dir={folder}/run"]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "GLOO_SOCKET_IFNAME": end}
        with (folder / f"{host}.log").open("w") as log:
            started.append(subprocess.Popen(command, cwd=folder / host, env=env, stdout=log, stderr=log))
    return started


def wait_for_round(folder: Path, number: int, running: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 100
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > number):
        assert time.monotonic() < deadline, (folder / f"{HOSTS[0]}.log").read_text()
        assert running[0].poll() is None, (folder / f"{HOSTS[0]}.log").read_text()
        time.sleep(0.01)


def pids_of(host: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", host).stdout.split()]


def kill_all_of(host: str) -> None:
    for pid in pids_of(host):
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(pid, signal.SIGKILL)


def trainers(host: str) -> list[int]:
    """Returns the running processes that torchrun started on a host."""
    found = []
    for pid in pids_of(host):
        with suppress(ProcessLookupError):  # it has ended since
            if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


def test_two_hosts_whose_cable_is_cut_end_with_the_weights_of_one(hosts, tmp_path):
    """test_ranks.py and test_killed.py cover killed ranks, whose connections the operating system closes."""
    running = start(tmp_path, 29871)
    wait_for_round(tmp_path, 10, running)
    assert len(trainers(HOSTS[1])) == 1
    assert ip("-n", HOSTS[1], "link", "set", "fedq-vb", "down").returncode == 0
    cut = time.monotonic()
    assert running[0].wait(60) != 0  # the other host does not wait without end
    assert time.monotonic() - cut < 40
    while trainers(HOSTS[1]):  # the host that was cut off does not wait either
        assert time.monotonic() - cut < 40
        time.sleep(0.1)
    kill_all_of(HOSTS[1])  # this host's torchrun would wait for the other host for minutes
    running[1].wait(60)
    told = (tmp_path / f"{HOSTS[0]}.log").read_text()
    assert "lost the connection" in told or "no sign of life" in told or "cannot reach the others" in told
    done = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert 10 < done < 40

    assert ip("-n", HOSTS[1], "link", "set", "fedq-vb", "up").returncode == 0
    for process in start(tmp_path, 29872):
        assert process.wait(200) == 0, (tmp_path / f"{HOSTS[0]}.log").read_text()
    assert "resumed after " in (tmp_path / f"{HOSTS[0]}.log").read_text()
    assert run_folders(tmp_path) == [tmp_path / "run"]
    assert not list((tmp_path / HOSTS[1]).iterdir())  # only rank 0 writes files
    fedq(tmp_path, *COMMAND, f"hydra.run.dir={tmp_path}/alone")
    assert_same_run(tmp_path / "run", tmp_path / "alone")
