"""A Flower deployment on this machine: a SuperLink, SuperNodes and runs, each a process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent

CONNECTION = """\
[superlink]
default = "here"

[superlink.here]
address = "{address}"
{security}
"""


class Deployment:
    """A SuperLink and its SuperNodes. At the end of the `with` block, all processes are killed.

    folder: Holds the logs and Flower's own files.
    """

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        *,
        at_link: Sequence[str] = (),
        at_nodes: Sequence[str] = (),
        link_options: Sequence[str] = ("--insecure",),
        security: str = "insecure = true",
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts the SuperLink and waits until it takes connections.

        folder: For logs and Flower's own files.
        host: The SuperLink's address.
        at_link: Words in front of the commands of the SuperLink and of the run, such as `ip netns exec a`.
        at_nodes: Words in front of the commands of nodes.
        link_options: More options of the SuperLink.
        security: The TLS settings of Flower's connection.
        environment: More variables of the environment, for all processes.
        """
        self.folder, self._at_link, self._at_nodes = folder, at_link, at_nodes
        home = folder / "flower"
        home.mkdir(parents=True, exist_ok=True)
        self._ports = _free_ports(16)
        self.address = f"{host}:{self._ports.pop()}"
        (home / "config.toml").write_text(CONNECTION.format(address=self.address, security=security))
        self._environment = os.environ | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            # the processes of apps run in this environment
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        port = self.address.rpartition(":")[2]
        self.link = self.start("link", [*at_link, "flower-superlink", *link_options, "--host", host, "--port", port])

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a process in a group of its own; its output goes to NAME.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)
        return process

    def node(self, partition: int, name: str = "", options: Sequence[str] = ("--insecure",)) -> subprocess.Popen[bytes]:
        """Starts the SuperNode of a client. It connects as soon as the SuperLink is up."""
        ports = ["--superlink", self.address, "--port", str(self._ports.pop())]
        config = ["--node-config", f"partition-id={partition}"]
        command = [*self._at_nodes, "flower-supernode", *options, *ports, *config]
        return self.start(name or f"node{partition}", command)

    def run(self, app: Path, config: str = "", seconds: float = 600) -> str:
        """Runs an app to its end and returns its log. Raises AssertionError, with the log, after `seconds`."""
        command = [*self._at_link, "flwr", "run", str(app), "here", "--stream"]
        started = time.monotonic()
        while True:  # the SuperLink may not be up yet
            process = self.start("run", [*command, *(["--run-config", config] if config else [])])
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, started + seconds - time.monotonic()))
            log = self.log("run")
            if "Successfully started run" in log or time.monotonic() > started + seconds:
                break
            time.sleep(1)
        assert process.poll() is not None, f"the run takes more than {seconds} seconds:\n{log}"
        return log

    def log(self, name: str) -> str:
        """Returns what a process has written."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def command(self, *arguments: str) -> None:
        """Runs a command of `flwr` once the SuperLink is up. Raises AssertionError, with the output, if it fails."""
        for _ in range(60):
            process = self.start("flwr", [*self._at_link, "flwr", *arguments, "here"])
            if not process.wait(120):
                return
            time.sleep(1)
        raise AssertionError(self.log("flwr"))

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """Kills a process and its child processes."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            self.kill(process)


def _free_ports(count: int) -> list[int]:
    """Returns ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
