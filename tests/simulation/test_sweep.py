"""Sweeps from the command line: Optuna's search, jobs on Slurm (four small scripts replace Slurm), used folders."""

import importlib.util
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import fedq
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_train import SMALL, assert_same_run, metrics_of

from fedq.simulation.sweep import objective
from fedq.tracking.summary import Summary
from fedq.tracking.units import human_bytes
from fedq.train import CONF

SHORT = (*SMALL, "run.rounds=2")
SEARCH = ("-m", "hydra/sweeper=fewest_bits", *SHORT, "encoder=uniform")


def summary(accuracy: float, bits: int) -> dict:
    return {"final_test_accuracy": accuracy, "broadcasted_bits": bits // 2, "aggregated_bits": bits - bits // 2}


def test_the_fewest_bits_come_first_then_what_misses_the_floor_by_least():
    runs = [summary(0.9, 100), summary(0.95, 101), summary(1.0, 10**18), summary(0.899, 1), summary(0.5, 1)]
    assert objective(runs[0], 0.9) == 100
    values = [objective(run, 0.9) for run in runs]
    assert values == sorted(values)
    assert len(set(values)) == len(values)
    assert max(values) < math.inf  # a failed job returns infinity
    assert objective(runs[4], None) == 1


def folders_and_summaries(sweep: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(sweep.glob("*/summary.json"))}


def test_a_search_finds_the_fewest_bits_and_given_again_goes_on(tmp_path):
    command = (*SEARCH, "encoder.bits=int(interval(1,8))", f"hydra.sweep.dir={tmp_path}/sweep")
    first = fedq(tmp_path, *command, "run.accuracy_floor=0", "hydra.sweeper.n_trials=3")
    runs = folders_and_summaries(tmp_path / "sweep")
    bits = {name: run["config"]["encoder"]["bits"] for name, run in runs.items()}
    least = min(bits, key=lambda name: bits[name])  # every job reaches this floor, so the best has the fewest bits
    found = f"fewest bits at a test accuracy of 0.00% or more: encoder.bits={bits[least]} in {tmp_path}/sweep/{least}, "
    assert found in first.stdout
    lines = metrics_of(tmp_path / "sweep" / least)
    total = sum(line["broadcast_bits"] + line["aggregated_bits"] for line in lines)
    assert f"with {human_bytes(total)} both ways" in first.stdout
    exact = runs[least]["uncompressed_broadcasted_bits"] / 32  # parameters of six messages, for six uploads
    assert f"{total / exact:.2f} bits a parameter down and up together" in first.stdout
    assert OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml").best_value == total

    # with another floor the search draws the same jobs and trains none of them again
    kept = {path: path.read_bytes() for path in (tmp_path / "sweep").glob("*/summary.json")}
    again = fedq(tmp_path, *command, "run.accuracy_floor=1", "hydra.sweeper.n_trials=8")
    more = folders_and_summaries(tmp_path / "sweep")
    assert kept == {path: path.read_bytes() for path in kept}
    trained = [run["config"]["encoder"]["bits"] for run in more.values()]
    assert len(trained) == len(set(trained)) < 8  # a choice drawn twice is trained once
    assert again.stderr.count("holds this run, finished: nothing to do") == 8 - (len(more) - len(runs))
    best = max(run["final_test_accuracy"] for run in more.values())
    (answer,) = (line for line in again.stdout.splitlines() if line.startswith("no job reached"))
    assert answer.startswith("no job reached a test accuracy of 100.00%; nearest is encoder.bits=")
    assert answer.endswith(f", with {best:.2%}")


def test_jobs_that_fail_do_not_end_a_search(tmp_path):
    rates = ("client.lr=1e30,0.1", "hydra.sweeper.n_trials=4")  # the first job diverges
    done = fedq(tmp_path, *SEARCH, *rates, "run.accuracy_floor=0", f"hydra.sweep.dir={tmp_path}/sweep", code=1)
    runs = folders_and_summaries(tmp_path / "sweep")
    assert {(run["status"], run["config"]["client"]["lr"]) for run in runs.values()} == {
        ("failed", 1e30),
        ("completed", 0.1),
    }
    assert len(list((tmp_path / "sweep").glob("[0-9]"))) == 4
    assert "fewest bits at a test accuracy of 0.00% or more: client.lr=0.1 in" in done.stdout
    assert "these jobs of the sweep failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Failed experiment" not in done.stdout  # Optuna learns from failed jobs
    results = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert results.best_params == {"client.lr": 0.1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encoder.bits=2,8",), "a search needs a required accuracy: set run.accuracy_floor"),
        (
            ("run.accuracy_floor=0.9", "encoder.bits=interval(1,8)"),
            "encoder.bits: 1.0 is not allowed; it must be an integer",
        ),
        (("run.accuracy_floor=90",), "run: accuracy_floor must be from 0 to 1, not 90"),
    ],
)
def test_a_search_is_checked_before_its_first_job(tmp_path, arguments, message):
    done = fedq(tmp_path, *SEARCH, *arguments, code=1)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_what_a_file_gives_to_search_is_checked_too(tmp_path):
    (tmp_path / "hydra" / "sweeper").mkdir(parents=True)
    mine = "defaults: [fewest_bits]\nparams: {encoder.bits: '8,eight'}\n"
    (tmp_path / "hydra" / "sweeper" / "mine.yaml").write_text(mine)
    arguments = ("-m", "--config-dir", str(tmp_path), "hydra/sweeper=mine", "run.accuracy_floor=0.9")
    done = fedq(tmp_path, *arguments, *SHORT, code=1)
    assert "encoder.bits: 'eight' is not allowed; it must be an integer" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_folder_of_another_sweep_is_left_as_it_is(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for seed in (0, 1):
            (tmp_path / f"sweep/{seed}/.hydra").mkdir(parents=True)
            OmegaConf.save(
                compose("config", [*SHORT, f"run.seed={seed}"]), tmp_path / f"sweep/{seed}/.hydra/config.yaml"
            )
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = fedq(tmp_path, "-m", *SHORT, "run.seed=0,2", f"hydra.sweep.dir={tmp_path}/sweep", code=1)
    assert f"{tmp_path}/sweep/1 holds another run: run.seed was 1, not 2; give" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("foreign", ["{}", "[]", "not json", '{"status": "failed"}', '{"status": "completed"}'])
def test_foreign_files_below_a_sweep_hide_no_failed_job(tmp_path, foreign):
    (tmp_path / "sweep" / "other").mkdir(parents=True)
    (tmp_path / "sweep" / "other" / "summary.json").write_text(foreign)
    (tmp_path / "sweep" / ".jobs").mkdir()
    (tmp_path / "sweep" / ".jobs" / "7").write_text(f"{tmp_path}/sweep/other")  # from an earlier sweep
    command = ("-m", *SHORT, "run.rounds=1", "run.clients_per_round=50", f"hydra.sweep.dir={tmp_path}/sweep")
    done = fedq(tmp_path, *command, code=1)
    listed = done.stderr[done.stderr.index("these jobs of the sweep failed") :].splitlines()[1:]
    assert [line.split(":")[0].strip() for line in listed] == [f"{tmp_path}/sweep/0"]


def test_a_sweep_in_a_folder_with_older_runs_speaks_of_its_own_jobs(tmp_path):
    fedq(tmp_path, *SHORT, "run.clients_per_round=50", "hydra.run.dir=outputs/failed", code=1)
    fedq(tmp_path, *SHORT, "run.clients_per_round=1", "encoder=sign", "hydra.run.dir=outputs/cheap")
    seeds = ("run.seed=0,1", "run.accuracy_floor=0")
    done = fedq(tmp_path, "-m", *SHORT, *seeds, "hydra.sweep.dir=outputs/")
    (answer,) = (line for line in done.stdout.splitlines() if line.startswith("fewest bits"))
    assert f" in {tmp_path}/outputs/" in answer
    assert "cheap" not in answer


def test_a_run_that_its_launcher_ends_is_interrupted(tmp_path):
    with pytest.raises(SystemExit), Summary(tmp_path):
        sys.exit(-1)  # submitit exits like this after a job is back in the queue
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"


SLURM = {
    "sbatch": """
        cp "$1" submitted.sh
        last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
        for task in $(seq 0 "$last"); do
            export SLURM_JOB_ID=$((70 + task)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task
            (bash "$1"; while [ -e "queued_7_$task" ]; do rm "queued_7_$task"; bash "$1"; done) >/dev/null 2>&1 &
        done
        echo Submitted batch job 7
    """,
    "srun": """
        while [[ $1 == --* ]]; do [ "$1" = --unbuffered ] || shift; shift; done
        echo $$ >"pid_$SLURM_ARRAY_TASK_ID"
        exec "$@" >>"log_$SLURM_ARRAY_TASK_ID" 2>&1
    """,
    "scontrol": 'touch "queued_$2"',
    "sacct": 'echo "JobID|State|NodeList"; echo "7_0|RUNNING|here"; echo "7_1|RUNNING|here"',
}


def test_on_slurm_a_job_that_is_stopped_goes_back_into_the_queue_and_on(tmp_path):
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": path}
    # two jobs with the same result; one is interrupted
    command = [sys.executable, "-m", "fedq.train", "-m", *SMALL, "hydra/launcher=slurm", "run.workers=1,2"]
    command += ["run.rounds=40", "run.evaluate_every=20", "run.checkpoint_every=1000", "hydra.sweep.dir=sweep"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        log = tmp_path / "log_0"
        while not (log.exists() and "round 5: " in log.read_text()):
            assert running.poll() is None, running.stdout.read()
            time.sleep(0.01)
        os.kill(int((tmp_path / "pid_0").read_text()), signal.SIGUSR2)  # Slurm sends this signal before it stops a job
        output = running.stdout.read().decode()
    assert running.returncode == 0, output
    assert int(log.read_text().split("resumed after ")[1].split()[0]) >= 5
    assert "resumed after " not in (tmp_path / "log_1").read_text()
    assert_same_run(tmp_path / "sweep" / "0", tmp_path / "sweep" / "1")
    runs = folders_and_summaries(tmp_path / "sweep")
    assert [runs[name]["status"] for name in ("0", "1")] == ["completed"] * 2
    for flag in ("--requeue", "--signal=USR2@120", "--time=720", "--cpus-per-task=4"):
        assert f"#SBATCH {flag}\n" in (tmp_path / "submitted.sh").read_text()


def test_a_summary_of_what_never_started_is_nobodys(tmp_path):
    """A repeated sweep reports the refused job again, and continues."""
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"), Summary(tmp_path) as own:
            raise ValueError("refused")
        assert own.is_ours
    with pytest.raises(ValueError, match="later"), Summary(tmp_path) as own:
        own.start({"run": {"seed": 3}}, 1)
        raise ValueError("later")
    with pytest.raises(ValueError, match="other"), Summary(tmp_path) as own:
        raise ValueError("other")
    assert not own.is_ours
    assert json.loads((tmp_path / "summary.json").read_text())["error"] == "later"


def test_the_commit_is_that_of_the_code_and_tells_of_changes(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=n", "-c", "user.email=e@x")
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True
        ).stdout

    code = tmp_path / "fedq" / "tracking" / "summary.py"
    code.parent.mkdir(parents=True)
    code.write_bytes(Path(inspect.getfile(Summary)).read_bytes())
    found = importlib.util.spec_from_file_location("copied", code)
    copied = importlib.util.module_from_spec(found)
    found.loader.exec_module(copied)
    assert copied._git_commit() is None  # no checkout
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project's")
    assert copied._git_commit() is None  # installed below a checkout
    git("add", ".")
    git("commit", "-q", "-m", "fedq")
    head = git("rev-parse", "HEAD").strip()
    assert copied._git_commit() == head
    code.write_text(code.read_text() + "\n")
    assert copied._git_commit() == f"{head}-dirty"
