"""Runs with an unusual folder, disk or locale, and the commands that a run prints for a shell."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import fedq
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from test_train import SMALL, metrics_of

from fedq import train
from fedq.simulation.earlier import in_short, is_inside

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "80"}
COMMAND = [sys.executable, "-m", "fedq.train"]


@pytest.mark.parametrize("name", ["plain", "encoder=uint8,lr=0.1 b", "it's", "täg", "a$HOME", "a${b}", 'a"b', "a\\'b"])
@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_the_printed_folder_survives_a_shell_and_hydra(name, mode, monkeypatch):
    folder = f"/somewhere/{name}"
    config = SimpleNamespace(mode=mode, runtime=SimpleNamespace(output_dir=folder), sweep=SimpleNamespace(dir=folder))
    monkeypatch.setattr(train.HydraConfig, "get", lambda: config)
    shell = f"printf %s {train._folder_argument()}"
    argument = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert shlex.split(shell)[-1] == argument
    with initialize_config_dir(str(train.CONF), version_base="1.3"):
        found = compose("config", [argument], return_hydra_config=True).hydra
    assert (found.run if mode == RunMode.RUN else found.sweep).dir == folder


def test_a_full_disk_does_not_hide_that_a_signal_ended_the_run(tmp_path):
    command = [*COMMAND, *SMALL, "run.rounds=100000", "run.checkpoint_every=100000", f"hydra.run.dir={tmp_path}/run"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True) as running:
        while "round 3: " not in running.stderr.readline():
            pass
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))  # less than a checkpoint
        running.send_signal(signal.SIGTERM)
        rest = running.stderr.read()
    assert running.returncode == 128 + signal.SIGTERM
    assert f"rounds is not saved: [Errno 27] File too large: '{tmp_path}/run/checkpoints/round_" in rest
    assert "to resume, give the same command again with" in rest
    assert "Traceback" not in rest and "bug" not in rest
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round_000000.pt"]


def test_a_checkpoint_that_does_not_fit_the_disk_is_named_in_one_sentence(tmp_path):
    shell = f"ulimit -f 300; {shlex.join([*COMMAND, *SMALL])} hydra.run.dir=run"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if " E " in line or "Error" in line]
    assert len(said) == 1
    assert said[0].endswith(f" E {tmp_path}/run/checkpoints/round_000000.pt: File too large")
    assert "bug" not in done.stderr


def test_the_log_is_utf_8_in_any_locale(tmp_path):
    env = ENV | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*COMMAND, "+encoder.unused=1", "hydra.run.dir=run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Logging error" not in done.stderr
    assert "${…}" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "run" / "train.log").mkdir(parents=True)
    done = fedq(tmp_path, *SMALL, "hydra.run.dir=run", code=1)
    assert done.stderr == f"fedq: {tmp_path}/run/train.log: Is a directory\n"


def test_what_killed_processes_left_is_removed(tmp_path):
    for place in ("summary.json", ".hydra/config.yaml", "checkpoints/round_000001.pt"):
        path = tmp_path / "run" / f"{place}.{'0f' * 16}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half a file")
    (tmp_path / "run" / "notes.tmp").write_text("not ours")
    fedq(tmp_path, *SMALL, "run.rounds=1", "hydra.run.dir=run")
    assert [path.name for path in (tmp_path / "run").rglob("*.tmp")] == ["notes.tmp"]


def test_a_loop_of_soft_links_is_no_run(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not is_inside(tmp_path / "loop", tmp_path / "run")
    done = fedq(tmp_path, *SMALL, "run.resume=loop", "hydra.run.dir=run", code=1)
    assert "run.resume: there is no usable checkpoint in loop" in done.stderr
    assert "Traceback" not in done.stderr
    assert metrics_of(tmp_path / "run") == []


def test_completion_is_offered_where_it_works(tmp_path):
    done = subprocess.run([*COMMAND, "-sc", "install=bash"], env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""  # `eval` of this output does nothing
    assert 'eval "$(fedq-train -sc install=bash)"' in done.stderr
    assert "complete -o nospace" in fedq(tmp_path, "-sc", "install=bash").stdout


def test_a_group_that_differs_in_many_keys_is_named_first():
    keys = [f"encoder.upload.key{i} was {i}, not absent" for i in range(15)]
    assert in_short([*keys, "run.seed was 0, not 1"]) == (
        "the encoder differs, in 15 keys: encoder.upload.key0 was 0, not absent, …; run.seed was 0, not 1"
    )
    assert in_short(keys[:2]) == "; ".join(keys[:2])
