"""Runs in which some or all processes are killed end like undisturbed runs. FEDQ_KILLS sets the number of kills."""

import os
import random
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command import PROCESSES, fedq
from test_train import SMALL, assert_same_run, metrics_of, run_folders

from fedq.models import MLP

KILLS = int(os.environ.get("FEDQ_KILLS", "10"))


def train(cwd: Path, arguments: list[str]) -> None:
    """Runs the command line in a process that has already loaded fedq."""
    from fedq.train import main

    os.chdir(cwd)
    output = os.open(cwd / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["fedq.train", *arguments]
    main()


KEEPING = ["encoder.upload.error_feedback=true", "algorithm.personal=[dense3.*]"]  # clients keep state
SPILLING = ["encoder=sign", *KEEPING, "run.residual_memory=1", "run.checkpoint_every=3", "run.workers=2"]


DRAWING = [
    *("client=adam", "client.keep_optimizer=true", "client.steps=2", "model._target_=test_killed.Dropping"),
    "client.schedule={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.9}",
    "+server.schedule={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.9}",
    *("run.residual_memory=3", "run.checkpoint_every=2", "run.workers=2"),
]


class Dropping(MLP):
    """A model that draws."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.2, self.training))


@pytest.mark.timeout(60 + 10 * KILLS)
@pytest.mark.parametrize(
    "options",
    [
        # with adaptive stages both ways, everything in a checkpoint affects the result
        ["encoder=powersgd", "run.checkpoint_every=1", "run.workers=1"],
        # the hidden layer has 0.6 MiB, so memory holds one of six clients' residuals
        SPILLING,
        # memory holds Adam's state of one or two of the six clients
        DRAWING,
    ],
    ids=["adaptive", "residuals in files", "dropout and kept optimizers"],
)
def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(tmp_path, options):
    command = [*SMALL, "server=adam", "server.lr=0.01", *options]  # a server optimizer with state
    command += ["run.evaluate_every=1"]  # otherwise metrics.jsonl would show the first run's last round

    def start(folder: str, rounds: int, *more: str) -> BaseProcess:
        arguments = [*command, f"run.rounds={rounds}", f"hydra.run.dir={tmp_path}/{folder}", *more]
        process = PROCESSES.Process(target=train, args=(tmp_path, arguments))
        process.start()
        return process

    draw, rounds, kills, in_a_write = random.Random(0), 20, 0, 0
    while kills < KILLS:
        process = start("killed", rounds)
        process.join(draw.uniform(0, 3))
        if process.is_alive():
            process.kill()  # the process may have just ended
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            in_a_write += any(tmp_path.glob("killed/checkpoints/**/*.tmp"))
        else:
            assert process.exitcode == 0, (tmp_path / "output.log").read_text()[-2000:]
            rounds += 20
    print(f"{kills} kills in {rounds} rounds, {in_a_write} of them inside the write of a file")
    # the undisturbed run has all residuals in memory, and one checkpoint at its end
    for folder, more in (("killed", []), ("whole", ["run.residual_memory=99", "run.checkpoint_every=1000"])):
        process = start(folder, rounds, *more)
        process.join()
        assert process.exitcode == 0, (tmp_path / "output.log").read_text()[-2000:]
    assert len(metrics_of(tmp_path / "whole")) == rounds
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert len(list(tmp_path.glob("killed/checkpoints/*.*"))) == 2
    killed, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*.residual")}
        for folder in ("killed", "whole")
    )
    assert killed | whole == killed  # the killed run has more files, for its second-to-last checkpoint
    assert len(whole) == (0 if "encoder=powersgd" in options else 6)


def test_torchrun_starts_a_killed_rank_again_and_the_run_goes_on(tmp_path):
    """torchrun starts two processes.

    After one is killed, torchrun restarts both, and the result is that of one process.
    """
    command = [*SMALL, "run.rounds=30", "run.checkpoint_every=1", "encoder=hadamard", *KEEPING]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    with subprocess.Popen(
        [*torchrun, "--max-restarts=1", "-m", "fedq.train", *command],
        cwd=ranks,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        log = []
        while "round 5: " not in (log[-1] if log else ""):
            log.append(running.stderr.readline())
            assert log[-1], "".join(log)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        (second,) = [c for c in children if b"\0RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes()]
        os.kill(int(second), signal.SIGKILL)
        log += running.stderr.read()
    assert running.returncode == 0, "".join(log)
    assert "resumed after " in "".join(log)
    (folder,) = run_folders(ranks)  # only rank 0 writes files, and a restarted rank 0 finds its folder
    fedq(tmp_path, *command, "run.workers=1", f"hydra.run.dir={tmp_path}/alone")
    assert_same_run(folder, tmp_path / "alone")


BROKEN = """
import os
import threading
from dataclasses import replace

from fedq.data.writers import Writers
from fedq.errors import FedqError


class Broken(Writers):
    def client(self, number):
        def load(client=super().client(number)):
            in_a_round = threading.current_thread() is not threading.main_thread()  # not in the check before it
            if os.environ["RANK"] == "0" and in_a_round:
                raise FedqError("a disk of rank 0 is broken")
            return client.load()

        return replace(super().client(number), load=load)
"""


def test_a_sweep_of_ranks_ends_where_rank_0_alone_fails_in_a_round(tmp_path):
    """The other ranks wait in the round. They would miss the orders of the next job, and all would wait without end."""
    (tmp_path / "broken.py").write_text(BROKEN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "fedq.train", "-m", *SMALL, "dataset._target_=broken.Broken", "run.seed=0,1"]
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count("E a disk of rank 0 is broken") == 1  # the second job does not start
