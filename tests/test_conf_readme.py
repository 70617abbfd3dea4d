"""Checks what the documents of conf/ say."""

import json
import re
from pathlib import Path

import pytest
from command import fedq
from encoding.configured import CONF, NAMES, config

TEXT = (CONF / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for _, text in BLOCKS:
        if name := re.match(r"# (\S+\.(py|yaml))\n", text):
            path = tmp_path / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


def test_ones_own_dataset_model_and_optimizer_train_as_shown(folder):
    (command,) = [text.split() for _, text in BLOCKS if "server=rmsprop" in text]
    fedq(folder, *command[3:])
    (path,) = folder.rglob("metrics.jsonl")
    *_, last = map(json.loads, path.read_text().splitlines())
    assert last["test/accuracy"] > 0.9
    assert last["clients"] == 10


def test_ones_own_task_is_short_and_trains_as_shown(folder):
    code, yaml = (text for _, text in BLOCKS if re.match(r"# (ordinal\.py|mine/task/ordinal\.yaml)\n", text))
    assert len([line for line in (code + yaml).splitlines() if line]) <= 20
    (command,) = [text.split() for _, text in BLOCKS if "task=ordinal" in text]
    done = fedq(folder, *command[3:])
    (path,) = folder.rglob("metrics.jsonl")
    *_, last = map(json.loads, path.read_text().splitlines())
    # with two classes the distance is the share of errors
    assert 0 < last["test/distance"] < 0.1
    assert last["train/distance"] < 0.1
    assert "train/accuracy" not in last
    (path,) = folder.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert summary["headline"] == ["distance", False]
    assert summary["best_test_distance"] == summary["final_test_distance"] == last["test/distance"]
    assert f"test distance          │ {last['test/distance']:.4g} (best" in done.stdout
    assert re.search(r"train distance 0\.\d{3}, test distance 0\.\d{3}", done.stderr)


def test_ones_own_encoder_starts_from_a_file_of_fedqs(folder):
    (command,) = [text.split() for _, text in BLOCKS if "encoder=fine_top_k" in text]
    small = ("dataset=noise", "model=linear", "encoder.threshold=100", "run.rounds=1", "client.lr=0.01")
    fedq(folder, *command[3:], *small)
    (path,) = folder.rglob("metrics.jsonl")
    bits = json.loads(path.read_text())["aggregated_bits"] / 10 / 1568
    assert 0.3 * 6 < bits < 0.3 * 8 + 2.5  # three elements in ten, their places, a table and a frame


def test_every_command_shown_chooses_what_there_is():
    for line in [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]:
        for group, choice in re.findall(r"\b(dataset|model|task|encoder|server|client|run)=(\w+)", line):
            files = [CONF / group / f"{choice}.yaml", Path("mine", group, f"{choice}.yaml")]
            assert files[0].exists() or f"# {files[1]}\n" in TEXT, line


def test_every_encoder_is_listed_once_with_its_directions():
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|\s*(↓?↑)\s*\|", (CONF / "encoder" / "README.md").read_text(), re.MULTILINE)
    listed = [(name, directions) for names, directions in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(name for name, _ in listed) == NAMES
    default = config("sign").encoder.broadcast
    for name, directions in listed:
        assert (directions == "↓↑") == (config(name).encoder.broadcast != default), name


def test_every_dataset_is_listed_once():
    rows = re.findall(r"^\| (`[^|]*) \|", (CONF / "dataset" / "README.md").read_text(), re.MULTILINE)
    listed = [name for names in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(listed) == sorted(path.stem for path in (CONF / "dataset").glob("*.yaml"))
