"""Every preset composes, can be overridden, and trains for two rounds: on small files in place of downloads."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from command import fedq
from data.cifar_files import write_cifar
from encoding.configured import CONF
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from test_datasets import SMALL, metrics_of
from test_train import emnist_files
from tff_files import cifar100_files, stackoverflow_files
from tiny_transformers import write_bert, write_llama

from fedq.config import check
from fedq.data import Examples
from fedq.learning import Classification, FederatedAveraging, LocalTraining, Multilabel, NextToken, Regression
from fedq.learning.evaluation import check as check_examples_fit
from fedq.learning.task import TaskError, remedy, remedy_of_model
from fedq.models import CharLSTM, FedAvgCNN, ResNet
from fedq.train import warn_of_rates

PRESETS = sorted(path.stem for path in Path(CONF, "experiment").glob("*.yaml"))
FILES = {  # preset → writes the files that its dataset would download
    "cifar10_resnet": lambda folder: write_cifar(folder, 10),
    "cifar100_resnet": cifar100_files,
    "emnist_cnn": lambda folder: emnist_files(folder, "fed_emnist", 62),
    "stackoverflow_lstm": stackoverflow_files,
    "lora_shakespeare": write_llama,
    "lora_minilm": write_bert,
}
SMALLER = {  # preset → overrides that keep the kind of model, task and optimizer
    "cifar10_resnet": ("dataset._target_=small.torchvision_dataset", "dataset.clients=4", "model.blocks=1"),
    "cifar100_resnet": ("model.blocks=1", "model.widths=[8,16]"),
    "shakespeare_lstm": ("dataset.test_examples=4",),
    "shakespeare_transformer": ("dataset.test_examples=4", "model.width=16", "model.layers=1"),
    "lora_shakespeare": ("dataset.test_examples=4", "model.base=files"),
    "lora_minilm": ("dataset.test_examples=4", "model.base=files"),
}


def configured(*overrides: str, **how: bool) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), **how)


@pytest.fixture(scope="module")
def eden() -> DictConfig:
    return configured("encoder=eden")


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_line_overrides_a_preset(name, eden):
    changes = [f"experiment={name}", "encoder=eden", "client.lr=0.05", "server=adam", "run.rounds=7"]
    preset, changed = configured(*changes[:1]), configured(*changes)
    check(changed, changes)
    assert preset.client.lr != 0.05 == changed.client.lr
    assert changed.run.rounds == 7
    assert changed.encoder == dict(eden.encoder) | {"threshold": preset.encoder.threshold} != preset.encoder
    assert changed.server._target_ == "torch.optim.Adam"
    for part in ("dataset", "model", "task"):
        assert changed[part] == preset[part]


@pytest.mark.parametrize(
    ("overrides", "warnings"),
    [
        (["client=adamw"], ["client.lr=0.1 is the rate of {}, not of client=adamw: set client.lr"]),
        (["server=adam"], ["server.lr=3.162 is the rate of {}, not of server=adam: set server.lr"]),
        (["client=adamw", "client.lr=0.1", "server=adam", "server.lr=0.1"], []),
        (["encoder=eden"], []),
    ],
)
def test_a_rate_that_stays_with_another_optimizer_is_a_warning(overrides, warnings, monkeypatch, caplog):
    cfg = configured("experiment=cifar100_resnet", *overrides, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig, "get", lambda: cfg.hydra)
    warn_of_rates()
    assert caplog.messages == [text.format("experiment=cifar100_resnet") for text in warnings]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(tmp_path, name):
    small = ("run.rounds=2", "run.clients_per_round=2", "run.evaluate_every=1", "client.max_examples=2")
    if name in FILES:
        (tmp_path / "small.py").write_text(SMALL)
        (tmp_path / "files").mkdir()
        FILES[name](tmp_path / "files")
        small += () if name.startswith("lora") else ("dataset.path=files",)
    fedq(tmp_path, f"experiment={name}", *small, *SMALLER.get(name, ()), "hydra.run.dir=run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    first, last = metrics_of(tmp_path / "run")
    assert first["test/loss"] != last["test/loss"]
    if name == "stackoverflow_lstm":
        assert 0 <= last["test/accuracy_without_special"] <= 1


def test_run_tutorial_is_the_preset():
    assert configured("run=tutorial") == configured("experiment=tutorial")


def test_every_preset_is_listed_as_it_is():
    text = (CONF / "README.md").read_text().split("## Presets")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")][1:]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    assert sorted(name for name, *_ in rows) == PRESETS
    for name, *parts, rate, server, _, rounds in rows:
        cfg = configured(f"experiment={name}", return_hydra_config=True)
        assert [cfg.hydra.runtime.choices[group] for group in ("dataset", "model", "task")] == parts
        assert (cfg.client.lr, cfg.server.lr) == (float(rate.removesuffix(", AdamW")), float(server))
        assert cfg.run.rounds == int(rounds.replace(",", ""))


def test_a_failed_download_prints_one_sentence(tmp_path, monkeypatch):
    rows = [line for line in (CONF / "dataset" / "README.md").read_text().splitlines() if "| a download" in line]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    monkeypatch.setenv("FEDQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no server answers at this address
    monkeypatch.setenv("no_proxy", "")
    done = fedq(tmp_path, "-m", f"dataset={','.join(names)}", "run.rounds=1", code=1)
    errors = re.findall(r"^ ?[\d:]{8} E (.*)$", done.stderr, re.MULTILINE)
    assert len(errors) == len(names) >= 7
    for sentence in errors:
        assert re.search(r"\(.*Connection refused.*\): try again, or .* dataset\.path= .*\.$", sentence)
    assert "Traceback" not in done.stderr
    assert "Downloading" not in done.stdout


TOKENS = Examples(torch.ones(4, 20, dtype=torch.int64), torch.full((4, 20), 2))
GREY = Examples(torch.zeros(4, 1, 28, 28), torch.tensor([0, 1, 2, 3]))
COLOUR = Examples(torch.zeros(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
LABELS = Examples(torch.zeros(4, 1, 28, 28), torch.eye(4, 10))
NUMBERS = Examples(torch.zeros(4, 1, 28, 28), torch.full((4,), 0.5))
TO_TOKENS = "; tokens need a model such as model=char_lstm"
TO_NEXT_TOKEN = "; targets that are tokens need task=next_token"
TO_CLASSES = "; targets that are classes need task=classification"
TO_CNN = r"; images of shape \(1, 28, 28\) need a model such as model=fedavg_cnn"


@pytest.mark.parametrize(
    ("examples", "model", "task", "remedy"),
    [
        (TOKENS, FedAvgCNN, Classification(), TO_TOKENS + TO_NEXT_TOKEN),  # dataset=shakespeare alone
        (TOKENS, FedAvgCNN, NextToken(), TO_TOKENS),
        (TOKENS, CharLSTM, Classification(), "and dtype int64" + TO_NEXT_TOKEN),
        (TOKENS, CharLSTM, Multilabel(), "and dtype int64" + TO_NEXT_TOKEN),
        (GREY, CharLSTM, Classification(), TO_CNN),  # model=char_lstm alone
        (GREY, CharLSTM, NextToken(), TO_CNN + TO_CLASSES),
        (GREY, FedAvgCNN, NextToken(), "and dtype int64" + TO_CLASSES),
        (GREY, FedAvgCNN, Regression(), "and dtype int64" + TO_CLASSES),
        (GREY, ResNet, Classification(), TO_CNN),
        (COLOUR, FedAvgCNN, Classification(), "; images .* need a model such as model=resnet20 model.channels=3"),
        (LABELS, FedAvgCNN, Classification(), "; targets that are labels of 0 and 1 need task=multilabel"),
        (NUMBERS, FedAvgCNN, Classification(), "; targets that are numbers need task=regression"),
    ],
)
def test_parts_that_do_not_fit_end_with_a_remedy(examples, model, task, remedy):
    process = FederatedAveraging(
        partial(model, num_classes=10), LocalTraining(lr=0.1), partial(torch.optim.SGD, lr=1.0), task=task
    )
    with pytest.raises(TaskError, match=f"{remedy}$"):
        check_examples_fit(process.protocol.model, "client 0", examples, task)


def test_examples_that_fit_have_no_remedy():
    for examples, task in ((TOKENS, NextToken()), (GREY, Classification()), (LABELS, Multilabel())):
        assert remedy(task, examples.y) == ""
    assert remedy(Regression(), NUMBERS.y) == ""
    assert remedy_of_model(torch.zeros(4, 20)) == ""
