"""Every task from the command line: its metrics in every output, and one sentence for a dataset that does not fit."""

import json
import math
import sys
from pathlib import Path

import pytest
from command import fedq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedq import compare
from fedq.errors import FedqError
from fedq.runs import read_run
from fedq.simulation.sweep import _fewest_bits, objective
from fedq.tracking.console import ConsoleProgress
from fedq.tracking.headline import ACCURACY, Headline
from fedq.tracking.summary import Summary
from fedq.train import CONF

PARTS = '''
import torch
from torch import nn

from fedq.data import Client, Examples


class Dataset:
    """Sequences, labels or numbers that a linear model can learn; `fault` says whose targets are out of range."""

    def __init__(self, kind, fault="", clients=6):
        self.kind, self.fault, self.num_clients = kind, fault, clients
        self.num_classes = 1 if kind == "regression" else 5

    def client(self, number):
        return Client(number, lambda: self.draw(number, self.fault == "all" or self.fault == str(number)), 20)

    def test(self):
        return self.draw(99, self.fault == "test", 50)

    def draw(self, seed, wrong, n=20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 8, generator=generator)
        if self.kind == "next_token":
            x = torch.randint(1, 5, (n, 7), generator=generator)
            y = torch.where(torch.rand(n, 7, generator=generator) < 0.3, 0, x % 4 + 1)
        elif self.kind == "multilabel":
            y = (x[:, :5] > 0.5).float()
        elif self.kind == "regression":
            y = x[:, 0] + 0.1 * torch.randn(n, generator=generator)
        else:
            y = x[:, :5].argmax(1)
        return Examples(x, y + 100 if wrong else y)


class Model(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.letters, self.layer = nn.Embedding(5, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.layer(x if x.is_floating_point() else self.letters(x))
'''
HEADLINES = {"classification": "accuracy", "next_token": "accuracy", "multilabel": "micro_f1", "regression": "mae"}
METRICS = {
    "classification": {"loss", "accuracy"},
    "next_token": {"loss", "accuracy", "accuracy_without_special", "perplexity"},
    "multilabel": {"loss", "micro_f1", "mean_average_precision"},
    "regression": {"loss", "mae", "r2"},
}


def command(folder: Path, task: str, *more: str) -> tuple[str, ...]:
    (folder / "parts.py").write_text(PARTS)
    for group, text in (
        ("dataset", '_target_: parts.Dataset\nkind: ???\nfault: ""\n'),
        ("model", "_target_: parts.Model\n_partial_: true\n"),
    ):
        path = folder / "mine" / group / "own.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    special = ["task.special=[1]"] if task == "next_token" else []
    own = ("--config-dir", "mine", "dataset=own", "model=own", f"task={task}", f"dataset.kind={task}", *special)
    return (*own, "run.clients_per_round=5", "run.evaluate_every=1", "client.batch_size=5", *more)


def lines_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def test_every_task_of_conf_is_tried_here():
    assert sorted(HEADLINES) == sorted(path.stem for path in Path(CONF, "task").glob("*.yaml"))


@pytest.mark.parametrize("task", HEADLINES)
def test_every_task_trains_and_workers_change_nothing(tmp_path, monkeypatch, capsys, task):
    name = HEADLINES[task]
    for workers in (1, 4):
        more = ("run.rounds=15", f"run.workers={workers}", f"hydra.run.dir={workers}")
        done = fedq(tmp_path, *command(tmp_path, task, *more))
    one, four = (lines_of(tmp_path / workers) for workers in ("1", "4"))
    assert one == four
    assert {key for key in one[-1] if key.startswith("test/")} == {f"test/{metric}" for metric in METRICS[task]}
    assert {key for key in one[-1] if key.startswith("train/")} == {"train/loss", f"train/{name}"}
    assert one[-1]["test/loss"] < 0.8 * one[0]["test/loss"]
    tested = [line[f"test/{name}"] for line in one]
    best = min(tested) if task == "regression" else max(tested)
    summary = json.loads((tmp_path / "4" / "summary.json").read_text())
    assert (summary[f"final_test_{name}"], summary[f"best_test_{name}"]) == (tested[-1], best)
    assert [key for key in summary if "accuracy" in key] == (
        ["final_test_accuracy", "best_test_accuracy"] if name == "accuracy" else []
    )
    shown = f"{best:.4g}" if task == "regression" else f"{best:.2%}"
    words = name.replace("_", " ")
    assert f"test {words}" in done.stdout and f"(best {shown})" in done.stdout
    assert f", test {'acc' if name == 'accuracy' else words} {tested[-1]:.3f}" in done.stderr
    (events,) = (tmp_path / "4").glob("encoder=*")
    curves = EventAccumulator(str(events)).Reload()
    tags = set(curves.Tags()["scalars"])
    assert {f"at_a_glance/test_{name}_by_KiB", f"at_a_glance/test_{name}", f"train/{name}"} <= tags
    assert curves.Scalars(f"at_a_glance/test_{name}_by_KiB")[-1].value == pytest.approx(tested[-1])

    target = sorted(tested)[7]
    monkeypatch.setattr(sys, "argv", ["fedq-compare", str(tmp_path / "4"), f"--target={target}", "--output=/dev/null"])
    compare.main()
    shown = f"{target:.4g}" if task == "regression" else f"{100 * target:g} %"
    assert f"bytes to {shown}" in capsys.readouterr().out
    reached = next(n for n, v in enumerate(tested, 1) if (v <= target if task == "regression" else v >= target))
    found = read_run(tmp_path / "4").reaches(target)
    assert found is not None and found[0] == reached


@pytest.mark.parametrize(
    ("fault", "whose"), [("all", "client 0"), ("0", "client 0"), ("test", "the test set"), ("3", "client 3")]
)
def test_a_dataset_that_does_not_fit_ends_the_run_with_one_sentence(tmp_path, fault, whose):
    more = (f"dataset.fault='{fault}'", "run.rounds=1", "run.clients_per_round=6", "hydra.run.dir=run")
    done = fedq(tmp_path, *command(tmp_path, "classification", *more), code=1)
    sentences = [line for line in done.stderr.splitlines() if "with the examples of" in line]
    assert len(sentences) == 1, done.stderr
    assert f"with the examples of {whose}: targets must be from 0 to 4, because the model has 5 outputs" in sentences[0]
    assert "left out" not in done.stderr
    # client 3 is read in the first round; all else is checked before
    assert (tmp_path / "run" / "checkpoints").exists() == (fault == "3")


def test_inputs_that_the_model_does_not_take_end_the_run_before_its_first_round(tmp_path):
    done = fedq(tmp_path, *command(tmp_path, "classification", "model=mlp", "hydra.run.dir=run"), code=1)
    assert "with the examples of client 0: the model fails on inputs of shape (2, 8) and dtype float32" in done.stderr
    assert "left out" not in done.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ('"right": int}', "task: sums() of Own lacks 'right', which `reported` names"),
        ('"distance": int}\n    headline = "near"', "task: metrics() of Own lacks 'near', the headline"),
        (
            '"distance": int}\n    loss = None',
            "task: Own fails on outputs of shape (2, 5) and dtype float32 and",
        ),
        (
            '"distance": int}\n    def loss(self, x, y): return F.cross_entropy(x, y)',
            "and dtype int64: TypeError: Own.loss() takes 3 positional arguments but 4 were given",
        ),
        ('"distance": int}\n    del sums', "task: Can't instantiate abstract class Own"),
    ],
)
def test_a_task_of_ones_own_with_a_fault_is_told_before_the_first_round(tmp_path, change, sentence):
    (tmp_path / "own.py").write_text(f"""
import torch.nn.functional as F
from fedq.learning import Task

class Own(Task):
    headline, more_is_better = "distance", False

    def loss(self, outputs, targets, reduction="mean"):
        return F.cross_entropy(outputs, targets, reduction=reduction)

    def sums(self, outputs, targets):
        return {{"distance": (outputs.argmax(1) - targets).abs().sum()}}

    reported = {{{change}
""")
    arguments = command(tmp_path, "classification", "task._target_=own.Own", "hydra.run.dir=run")
    assert sentence in fedq(tmp_path, *arguments, code=1).stderr


# a headline of which less is better

MAE = Headline("mae", more_is_better=False)


def test_a_headline_knows_what_is_better():
    assert (ACCURACY.best([0.2, 0.5]), MAE.best([0.2, 0.5])) == (0.5, 0.2)
    assert ACCURACY.reaches(0.5, 0.5) and ACCURACY.reaches(0.6, 0.5) and not ACCURACY.reaches(0.4, 0.5)
    assert MAE.reaches(0.5, 0.5) and MAE.reaches(0.4, 0.5) and not MAE.reaches(0.6, 0.5)
    assert (ACCURACY.text(0.961), MAE.text(0.12345), MAE.text(None)) == ("96.10%", "0.1235", "not finite")
    assert Headline.of({"rounds": 3}) == ACCURACY
    assert Headline.of(json.loads(json.dumps({"headline": MAE}))) == MAE


def summary(mae: float | None, bits: int) -> dict:
    both = {"broadcasted_bits": bits // 2, "aggregated_bits": bits - bits // 2}
    return {"headline": ["mae", False], "final_test_mae": mae, "broadcast_ratio": 4.0, "upload_ratio": 4.0, **both}


def test_a_search_takes_the_floor_as_the_largest_error_allowed(tmp_path):
    runs = [summary(0.3, 100), summary(0.1, 101), summary(0.31, 1), summary(0.9, 1), summary(None, 1)]
    values = [objective(run, 0.3) for run in runs]
    assert values == sorted(values) and values[1] == 101 < 1e30 < values[2]
    assert values[-1] == math.inf and objective(runs[-1], None) == 1
    for number in range(5):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(f"- client.lr={number}\n")
    folders = {tmp_path / str(number): run for number, run in enumerate(runs)}
    assert "fewest bits at a test mae of 0.3 or less: client.lr=0 in" in _fewest_bits(folders, 0.3, [])
    assert "no job reached a test mae of 0.05; nearest is client.lr=1 in" in _fewest_bits(folders, 0.05, [])


def test_a_floor_above_1_is_a_fault_only_where_more_is_better(tmp_path):
    floor = ("run.accuracy_floor=3", "run.rounds=1", "hydra.sweep.dir=sweep", "client.lr=0.1,0.01")
    done = fedq(tmp_path, "-m", *command(tmp_path, "classification", *floor), code=1)
    assert "run: accuracy_floor must be from 0 to 1, not 3" in done.stderr
    done = fedq(tmp_path, "-m", *command(tmp_path, "regression", *floor))
    assert "fewest bits at a test mae of 3 or less: client.lr=0." in done.stdout


def test_a_value_that_is_no_number_is_not_the_best(tmp_path, capsys):
    found = Summary(tmp_path)
    found.start({"run": {"seed": 0, "clients_per_round": 1}}, 8, MAE)
    sent = dict.fromkeys(("cumulative_broadcasted_bits", "cumulative_aggregated_bits", "uploads", "seconds"), 1.0)
    for mae in (0.5, math.inf, 0.7, math.nan):
        found.write({**sent, "repeats": 0, "test/mae": mae})
    assert (found.values["best_test_mae"], found.values["final_test_mae"]) == (0.5, None)
    found.print()
    assert "not finite (best 0.5)" in capsys.readouterr().out


def test_the_bar_shows_the_headline(caplog):
    caplog.set_level("INFO")
    bar = ConsoleProgress(3, headline=Headline("micro_f1"))
    sent = {"cumulative_broadcasted_bits": 8, "cumulative_aggregated_bits": 8, "round": 0, "seconds": 1.0}
    bar.write({**sent, "train/loss": 0.5, "train/micro_f1": 0.25, "test/micro_f1": 0.75})
    bar.close()
    assert "train loss 0.500, train micro f1 0.250, test micro f1 0.750" in caplog.text


def test_runs_of_different_tasks_are_not_compared(tmp_path):
    for task in ("classification", "regression"):
        fedq(tmp_path, *command(tmp_path, task, "run.rounds=1", f"hydra.run.dir={task}"))
    runs = [read_run(tmp_path / task) for task in ("classification", "regression")]
    apart = f"test accuracy in {tmp_path / 'classification'}; test mae in {tmp_path / 'regression'}"
    with pytest.raises(FedqError, match=f"different metrics must be compared separately: {apart}"):
        compare.target_of(runs, None)
    assert compare.target_of(runs[:1], None) == 0.95
    assert compare.target_of(runs[1:], None) == runs[1].summary["final_test_mae"]
    assert compare.target_of(runs[1:], 7.5) == 7.5
    with pytest.raises(FedqError, match="--target: 7.5 is not an accuracy"):
        compare.target_of(runs[:1], 7.5)
