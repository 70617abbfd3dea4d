"""What the README shows works as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from command import fedq

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(*command: str, cwd: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_files(folder: Path) -> None:
    for _, text in BLOCKS:
        if name := re.match(r"# (\S+\.(py|yaml))\n", text):
            path = folder / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def train(folder: Path, encoder: str, rounds: int) -> list[dict]:
    (command,) = [text for _, text in BLOCKS if "--config-dir" in text]
    small = "dataset=writers dataset.clients=4 dataset.examples_per_client=5 model=mlp run.clients_per_round=2"
    _, *command = command.replace("mean_sign", encoder).split()
    command += [*small.split(), f"run.rounds={rounds}"]
    if encoder == "mean_sign":  # as it stands there
        run(*command, cwd=folder)
    else:
        fedq(folder, *command[2:])
    (metrics,) = folder.rglob("metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


EXACT = 4 * (200 + 200 + 2000 + 10)  # bytes of the MLP's tensors below the threshold


def test_ones_own_stage_is_two_files_and_costs_one_bit(tmp_path):
    write_files(tmp_path)
    message = 48 + (156_800 + 40_000) // 8 + 2 * 8 + EXACT
    assert train(tmp_path, "mean_sign", 2)[0]["aggregated_bits"] == 8 * 2 * message


def test_a_stage_that_learns_is_told_in_the_broadcast(tmp_path):
    write_files(tmp_path)
    files = {text for _, text in BLOCKS if re.match(r"# \S*plus_one.(py|yaml)\n", text)}
    assert len(files) == 2
    assert sum(bool(line) for text in files for line in text.splitlines()) <= 30
    message = 48 + 4 * (156_800 + 40_000) + EXACT
    for metrics in train(tmp_path, "plus_one", 3):
        assert metrics["broadcast_bits"] == 8 * 2 * (message + 2 * 4)
        assert metrics["aggregated_bits"] == 8 * 2 * message


def test_the_stages_shown_pass_the_battery(tmp_path):
    write_files(tmp_path)
    assert "check_stage(PlusOneOverN())" in (tmp_path / "check.py").read_text()
    run("check.py", cwd=tmp_path)


def test_the_python_api_works_as_shown(tmp_path):
    (program,) = [text for language, text in BLOCKS if language == "python" and "FederatedAveraging(" in text]
    lines = run("-c", program, cwd=tmp_path).strip().splitlines()
    losses = [float(line.split()[0]) for line in lines[:3]]
    assert losses[2] < losses[0]
    assert all(abs(int(float(line.split()[1])) / 5 - 13_463_872) < 8 * 80 for line in lines[:3])
    assert "accuracy" in lines[3]
