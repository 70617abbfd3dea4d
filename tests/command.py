"""Commands of fedq.train, each in a new process, forked from a server that has imported all modules.

The imports take longer than most commands. test_readme.py, test_killed.py and test_wheel.py start `python -m
fedq.train` itself.
"""

import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

from fedq.train import main

PROCESSES = multiprocessing.get_context("forkserver")
"""Tests start processes here: all share one server and its imports."""

PROCESSES.set_forkserver_preload(
    ["command", "fedq.models", "fedq.simulation.run", "numba", "torch._dynamo", "torch.utils.tensorboard"]
)


def fedq(cwd: Path, *arguments: str, code: int = 0, timeout: float = 280) -> CompletedProcess:
    """Runs the command with `arguments`, and returns its output. Its exit code must be `code`."""
    with TemporaryDirectory() as folder:
        outputs = Path(folder) / "stdout", Path(folder) / "stderr"
        process = PROCESSES.Process(target=_command, args=(cwd, os.environ | {"COLUMNS": "100"}, arguments, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutExpired(arguments, timeout)
        done = CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _command(cwd: Path, env: dict[str, str], arguments: tuple[str, ...], outputs: tuple[Path, Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["fedq.train", *arguments]
    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    main()
