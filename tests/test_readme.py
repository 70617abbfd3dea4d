"""The code in README.md and in the author's guide works as written."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command import fedq

ROOT = Path(__file__).parents[1]
README, GUIDE = (
    re.findall(r"```(\w+)\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
    for path in ("README.md", "fedq/encoding/README.md")
)


def run(*command: str, cwd: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    for _, text in README + GUIDE:
        if name := re.match(r"# (\S+\.(py|yaml))\n", text):
            path = tmp_path / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


def train(folder: Path, encoder: str, rounds: int) -> list[dict]:
    shown = [text.split() for _, text in README + GUIDE if "--config-dir" in text]
    command = next((words for words in shown if f"encoder={encoder}" in words), shown[0])
    command = [f"encoder={encoder}" if word.startswith("encoder=") else word for word in command[1:]]
    small = "dataset=writers dataset.clients=4 dataset.examples_per_client=5 model=mlp run.clients_per_round=2"
    command += [*small.split(), f"run.rounds={rounds}"]
    if encoder == "mean_sign":  # as in the guide
        run(*command, cwd=folder)
    else:
        fedq(folder, *command[2:])
    (metrics,) = folder.rglob("metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


COMPRESSED = 156_800 + 40_000  # elements of the MLP's tensors above the threshold
EXACT = 4 * (200 + 200 + 2000 + 10)  # bytes of the others


def test_the_stage_of_the_readme_sends_two_bytes_an_element(folder):
    message = 48 + 2 * COMPRESSED + EXACT
    assert train(folder, "half_width", 1)[0]["aggregated_bits"] == 8 * 2 * message


def test_ones_own_stage_is_two_files_and_costs_one_bit(folder):
    message = 48 + COMPRESSED // 8 + 2 * 8 + EXACT
    assert train(folder, "mean_sign", 2)[0]["aggregated_bits"] == 8 * 2 * message


def test_a_stage_that_learns_is_told_in_the_broadcast(folder):
    files = {text for _, text in GUIDE if re.match(r"# \S*plus_one.(py|yaml)\n", text)}
    assert len(files) == 2
    assert sum(bool(line) for text in files for line in text.splitlines()) <= 30
    message = 48 + 4 * COMPRESSED + EXACT
    for metrics in train(folder, "plus_one", 3):
        assert metrics["broadcast_bits"] == 8 * 2 * (message + 2 * 4)
        assert metrics["aggregated_bits"] == 8 * 2 * message


def test_the_stages_shown_pass_the_battery(folder):
    assert "check_stage(PlusOneOverN())" in (folder / "check.py").read_text()
    run("check.py", cwd=folder)
    run("-c", "from fedq.encoding.testing import *; from half_width import *; check_stage(HalfWidth())", cwd=folder)


def test_the_coder_shown_passes_the_battery(folder):
    assert "check_coder(Deflate()" in (folder / "check_deflate.py").read_text()
    run("check_deflate.py", cwd=folder)


def test_the_chains_shown_compress_what_the_guide_says(folder):
    *chains, size = run("chains.py", cwd=folder).splitlines()
    assert chains == ["conv.weight compressed", "dense.weight compressed", "bias exact"]
    exact = 4 * (64 * 32 * 25 + 100 * 200 + 9)
    assert int(size.split()[0]) < exact / 8


def test_the_encoder_alone_works_as_shown(tmp_path):
    (program,) = [text for language, text in README if language == "python" and "codec.encode(state" in text]
    checked = "assert (received['weight'] - state['weight']).abs().max() <= 2 * 1000**-0.5 / 255"
    size, *_, exact = run("-c", program + checked, cwd=tmp_path).split()
    assert int(size) == 48 + 2 * 4 + 100_000 + 400
    assert int(exact) == 400_400


def test_the_python_api_works_as_shown(tmp_path):
    (program,) = [text for language, text in README if language == "python" and "FederatedAveraging(" in text]
    lines = run("-c", program, cwd=tmp_path).strip().splitlines()
    losses = [float(line.split()[0]) for line in lines[:3]]
    assert losses[2] < losses[0]
    assert all(abs(int(float(line.split()[1])) / 5 - 13_463_872) < 8 * 80 for line in lines[:3])
    assert "accuracy" in lines[3]


def commands():
    lines = [line for language, text in README if language == "bash" for line in text.splitlines()]
    return [line for line in lines if "-m fedq.train" in line and not re.search("--config-dir|--help", line)]


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_is_a_valid_configuration(line, tmp_path):
    *_, arguments = line.split("-m fedq.train")
    words = [word for word in shlex.split(arguments, comments=True) if word != "-m" and not word.startswith("hydra")]
    first = [re.sub(r"=int\(.*|,.*", lambda found: "=1" if "int" in found[0] else "", word) for word in words]
    assert "encoder:" in fedq(tmp_path, *first, "--cfg", "job").stdout


@pytest.mark.parametrize(
    "path",
    ["README.md", "fedq/encoding/README.md", "conf/README.md", "conf/dataset/README.md", "conf/encoder/README.md"],
)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / path).read_text()):
        assert ((ROOT / path).parent / link).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
