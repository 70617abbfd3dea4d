"""What the README shows works as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(*command: str, cwd: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ones_own_stage_is_two_files_and_costs_one_bit(tmp_path):
    for _, text in BLOCKS:
        if name := re.match(r"# (\S+\.(py|yaml))\n", text):
            path = tmp_path / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (command,) = [text for _, text in BLOCKS if "--config-dir" in text]
    small = "dataset=writers dataset.clients=4 dataset.examples_per_client=5 model=mlp"
    run(*command.split()[1:], *small.split(), "run.rounds=2", "run.clients_per_round=2", cwd=tmp_path)
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    first = json.loads(metrics.read_text().splitlines()[0])
    message = 48 + (156_800 + 40_000) // 8 + 2 * 4 + 4 * (200 + 200 + 2000 + 10)
    assert first["aggregated_bits"] == 8 * 2 * message


def test_the_python_api_works_as_shown(tmp_path):
    (program,) = [text for language, text in BLOCKS if language == "python" and "FederatedAveraging(" in text]
    lines = run("-c", program, cwd=tmp_path).strip().splitlines()
    losses = [float(line.split()[0]) for line in lines[:3]]
    assert losses[2] < losses[0]
    assert all(abs(int(float(line.split()[1])) / 5 - 13_463_872) < 8 * 80 for line in lines[:3])
    assert "accuracy" in lines[3]
