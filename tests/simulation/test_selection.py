"""Validation, early stop, best checkpoint and evaluation of single clients, as a user sees them."""

import json
import logging
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import fedq
from noise import RUN, Noise, make_process
from test_train import SMALL, assert_same_run, metrics_of

from fedq.data import Client, Examples
from fedq.errors import FedqError
from fedq.learning import Classification, evaluate
from fedq.learning.evaluation import evaluate_clients
from fedq.simulation import checkpoint
from fedq.simulation.loop import rounds
from fedq.simulation.selection import Selection
from fedq.simulation.sweep import chosen_by, objective
from fedq.simulation.workers import Workers
from fedq.tracking.headline import ACCURACY, Headline

VALIDATED = replace(RUN, rounds=100, validation=0.5, patience=2)


def followed(values, run=VALIDATED, headline=ACCURACY, name="validation/accuracy"):
    """Returns the selection after evaluations with these values, in every second round."""
    selection = Selection(run, headline)
    for i, value in enumerate(values):
        tested = name.replace("validation", "test")
        for metrics in ({"round": 2 * i}, {"round": 2 * i + 1} | {tested: i / 10, name: value}):
            assert not selection.stops()
            selection.write(metrics)
    return selection


def test_the_best_is_strictly_better_and_patience_counts_evaluations(caplog):
    selection = followed([0.1, 0.3, 0.3, 0.2])
    assert selection.values["set"] == "validation"
    assert [selection.values[name] for name in ("best", "round", "test", "final")] == [0.3, 4, 0.1, 0.2]
    with caplog.at_level(logging.INFO):
        assert selection.stops() and selection.stops()
    (line,) = caplog.messages
    assert line == ("run.patience: 2 evaluations in a row have not improved validation/accuracy: best after 4 rounds")
    assert selection.values["stopped_early"]
    assert not followed([0.1, 0.3, 0.3, 0.4, 0.3]).stops()
    assert not followed([0.3, 0.2, 0.1], replace(VALIDATED, patience=None)).stops()


def test_a_run_without_validation_and_patience_follows_nothing():
    selection = followed([0.1, 0.3], replace(VALIDATED, validation=None, patience=None), name="test/accuracy")
    assert not selection.chooses and not selection.improved and not selection.stops()
    assert (selection.values["best"], selection.values["round"]) == (None, None)


def test_less_may_be_better_and_nan_never_is():
    perplexity = Headline("perplexity", more_is_better=False)
    selection = followed([math.nan, 9.0, 7.0, 8.0, math.nan], headline=perplexity, name="validation/perplexity")
    assert [selection.values[name] for name in ("best", "round", "final")] == [7.0, 6, None]
    assert followed([math.nan, math.nan]).stops()


def test_without_validation_the_test_set_chooses():
    selection = followed([0.2, 0.1], replace(VALIDATED, validation=None), name="test/accuracy")
    assert [selection.values[name] for name in ("set", "best", "test")] == ["test", 0.2, 0.2]


class Shifted(Noise):
    """Noise with a validation set."""

    def validation(self):
        return Examples(torch.ones(30, 1, 28, 28), torch.arange(30) % 10)


def test_the_loop_evaluates_the_validation_set_and_stops_when_asked():
    process, dataset = make_process(), Shifted()
    run = replace(RUN, validation="own")
    *_, (state, metrics) = rounds(process, process.initialize(), dataset, run)
    expected = process.evaluate(state, dataset.validation())
    assert {name: metrics[f"validation/{name}"] for name in expected} == expected
    plain = [m for _, m in rounds(make_process(), process.initialize(), dataset, RUN)]
    assert not any(name.startswith("validation/") for m in plain for name in m)
    assert plain[-1]["test/loss"] == metrics["test/loss"]  # validation changes no other metric
    asked = iter([False, False, True])
    assert len(list(rounds(make_process(), process.initialize(), dataset, run, stop=lambda: next(asked)))) == 2
    with pytest.raises(FedqError, match="the dataset has no validation examples: hold some out"):
        next(rounds(make_process(), process.initialize(), Noise(), run))


@pytest.mark.parametrize("part", ["test", "validation", "load"])
def test_each_client_is_evaluated_on_its_own_examples(part):
    process, dataset = make_process(), Noise()
    *_, (state, _) = rounds(process, process.initialize(), dataset, replace(RUN, rounds=2))
    model = process.protocol.model
    model.load_state_dict(state.weights)

    def own(number):
        generator = torch.Generator().manual_seed(number)
        return Examples(torch.rand(9, 1, 28, 28, generator=generator), (torch.arange(9) * number + number // 2) % 10)

    def client(number):
        parts = ("test", "validation", "load")
        others = dict.fromkeys(parts[parts.index(part) + 1 :], lambda: pytest.fail("others are better"))
        return replace(dataset.client(number), **{**others, part: lambda: own(number)})

    def empty():
        return Examples(torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64))

    clients = [*map(client, range(23)), replace(dataset.client(23), test=empty)]
    values = [evaluate(model, own(number))["accuracy"] for number in range(23)]
    assert len(set(values)) > 2
    found = process.evaluate_clients(state, clients)
    assert found == {
        "accuracy_mean": pytest.approx(sum(values) / 23),
        "accuracy_median": statistics.median(values),
        "accuracy_worst_tenth": pytest.approx(sum(sorted(values)[:3]) / 3),
    }
    with Workers(3) as workers:
        process.map = workers.map
        assert process.evaluate_clients(state, clients) == found
    process.map = map

    def fails(error):
        raise error

    broken = Client(99, clients[0].load, test=lambda: fails(ValueError("no such shape")))
    assert process.evaluate_clients(state, [*clients, broken]) == found
    with pytest.raises(FedqError, match=r"the dataset's client 99 cannot be read: \[Errno 5\] no disk"):
        process.evaluate_clients(state, [replace(broken, test=lambda: fails(OSError(5, "no disk")))])
    with pytest.raises(FedqError, match=r"run.evaluate_clients: these clients have no examples"):
        process.evaluate_clients(state, clients[23:])


def test_the_worst_of_a_loss_is_the_largest():
    class Task(Classification):
        headline, more_is_better = "loss", False

    dataset, process = Noise(), make_process()
    model = process.protocol.model
    losses = [evaluate(model, dataset.client(number).load())["loss"] for number in range(15)]
    found = evaluate_clients(lambda client: model, map(dataset.client, range(15)), 50, map, "float32", Task())
    assert found["loss_worst_tenth"] == pytest.approx(sum(sorted(losses)[-2:]) / 2, rel=1e-12)  # of 15 clients, two


EARLY = (*SMALL, "run.rounds=40", "run.evaluate_every=1", "run.validation=0.3", "run.patience=2", "client.lr=0.02")


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_an_early_stop_is_the_same_when_resumed_and_its_best_checkpoint_stays(tmp_path):
    options = (*EARLY, "run.evaluate_clients=all", "run.keep=1", "run.checkpoint_every=7")
    done = fedq(tmp_path, *options, "run.workers=1", f"hydra.run.dir={tmp_path}/whole")
    whole = metrics_of(tmp_path / "whole")
    rounds_done, chosen = len(whole), summary_of(tmp_path / "whole")["selection"]
    values = [line["validation/accuracy"] for line in whole]
    best = values.index(max(values))
    assert best + 3 == rounds_done < 40  # two evaluations without improvement
    assert chosen == {
        "set": "validation",
        "final": values[-1],
        "best": values[best],
        "round": best + 1,
        "test": whole[best]["test/accuracy"],
        "stopped_early": True,
    }
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").glob("*.pt"))
    assert names == [f"round_{best + 1:06d}.pt", f"round_{rounds_done:06d}.pt"]
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"│ validation accuracy │ {values[-1]:.2%} (best {values[best]:.2%} after round {best + 1}) │" in rows
    assert f"│ test after round {best + 1} │ {whole[best]['test/accuracy']:.2%} │" in rows
    assert f"validation acc {values[0]:.3f}, test acc" in done.stderr

    # a run in another folder, which resumes this one, has the best checkpoint too
    fedq(tmp_path, *options, "run.workers=1", f"run.resume={tmp_path}/whole", f"hydra.run.dir={tmp_path}/other")
    assert sorted(path.name for path in (tmp_path / "other" / "checkpoints").glob("*.pt")) == names

    # the run stops a round early, and the same command resumes the run
    short = (*options, "run.workers=2", f"hydra.run.dir={tmp_path}/resumed")
    fedq(tmp_path, *short, f"run.rounds={rounds_done - 1}")
    assert not summary_of(tmp_path / "resumed")["selection"]["stopped_early"]
    fedq(tmp_path, *short)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert summary_of(tmp_path / "resumed")["selection"] == chosen
    assert names == sorted(path.name for path in (tmp_path / "resumed" / "checkpoints").glob("*.pt"))
    again = fedq(tmp_path, *short)
    assert "finished: nothing to do" in again.stderr

    # a run without its summary is resumed, and does no further round; more patience continues the run
    (tmp_path / "resumed" / "summary.json").unlink()
    fedq(tmp_path, *short)
    assert summary_of(tmp_path / "resumed")["selection"] == chosen
    assert len(metrics_of(tmp_path / "resumed")) == rounds_done
    fedq(tmp_path, *short, "run.patience=100", f"run.rounds={rounds_done + 1}")
    assert len(metrics_of(tmp_path / "resumed")) == rounds_done + 1

    # the best checkpoint can be resumed from
    fedq(tmp_path, *options, f"run.resume={tmp_path}/whole/checkpoints/{names[0]}", f"hydra.run.dir={tmp_path}/best")
    assert_same_run(tmp_path / "best", tmp_path / "whole")


def test_a_best_checkpoint_keeps_the_clients_state_that_it_needs(tmp_path):
    options = (*EARLY, "encoder=sign", "encoder.upload.error_feedback=true", "run.keep=1", "run.checkpoint_every=1")
    options = (*options, "run.residual_memory=0", "run.validation_by=clients")
    fedq(tmp_path, *options, f"hydra.run.dir={tmp_path}/whole")
    chosen = summary_of(tmp_path / "whole")["selection"]
    assert chosen["round"] < len(metrics_of(tmp_path / "whole")) - 1
    best = tmp_path / "whole" / "checkpoints" / f"round_{chosen['round']:06d}.pt"
    fedq(tmp_path, *options, f"run.resume={best}", f"hydra.run.dir={tmp_path}/best")
    assert_same_run(tmp_path / "best", tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("run.validation=1.5",), "run: validation must be above 0 and below 1, or own, not 1.5"),
        (("run.validation=mine",), "run.validation: 'mine' is not allowed; it must be a number or own or null"),
        (("run.validation=own",), "run.validation: the dataset has no validation examples: hold some out"),
        (("run.patience=0",), "run: patience must be 1 or more, not 0"),
        (("run.evaluate_clients=7",), "run.evaluate_clients: 7 is more than the 6 clients; take fewer, or all"),
        (("run.validation=0.7", "run.validation_by=clients"), "run.clients_per_round: 3 is more than the 2 clients"),
    ],
)
def test_what_cannot_be_validated_is_told(tmp_path, options, sentence):
    done = fedq(tmp_path, *SMALL, *options, code=1)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_patience_without_validation_warns(tmp_path):
    done = fedq(tmp_path, *SMALL, "run.patience=1", "run.rounds=1")
    assert "run.patience chooses by the test set, whose result is then too optimistic" in done.stderr
    assert summary_of(next(tmp_path.rglob("summary.json")).parent)["selection"]["set"] == "test"


def test_pruning_leaves_the_best(tmp_path):
    state = make_process().initialize()
    for done in range(1, 6):
        checkpoint.save(replace(state, round=done), {}, tmp_path, 2, best=2 if done > 1 else 1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"round_00000{n}.pt" for n in (2, 4, 5)]
    assert checkpoint.attempts(tmp_path) == [5, 4, 2]
    checkpoint.save(replace(state, round=1), {}, tmp_path, 2, best=2)  # resumed from an earlier round
    assert [path.name for path in tmp_path.iterdir()] == ["round_000001.pt"]


def test_a_search_chooses_by_validation_and_reports_the_test(tmp_path):
    selection = {"set": "validation", "final": 0.8}
    bits = {"broadcasted_bits": 3, "aggregated_bits": 4}
    chosen, other = ({"final_test_accuracy": 0.9, **bits, **more} for more in ({"selection": selection}, {}))
    assert (chosen_by(chosen), chosen_by(other)) == ((0.8, "validation"), (0.9, "test"))
    assert (objective(other, 0.85), objective(chosen, 0.8)) == (7, 7)
    assert objective(chosen, 0.85) > 1e30
    command = ("-m", *SMALL, "run.rounds=1", "run.validation=0.3", "run.seed=0,1", "run.accuracy_floor=0")
    done = fedq(tmp_path, *command, f"hydra.sweep.dir={tmp_path}")
    (answer,) = (line for line in done.stdout.splitlines() if line.startswith("fewest bits"))
    best = min((summary_of(tmp_path / job) for job in "01"), key=lambda summary: objective(summary, 0))
    assert answer.startswith("fewest bits at a validation accuracy of 0.00% or more: run.seed=")
    assert answer.endswith(f"at {best['selection']['final']:.2%} (test {best['final_test_accuracy']:.2%})")


@pytest.mark.parametrize("by", ["examples", "clients"])
def test_ranks_hold_out_the_same(tmp_path, by):
    options = (*SMALL, "run.validation=0.4", f"run.validation_by={by}", "run.evaluate_clients=2", "run.workers=1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fedq.train"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *options, f"hydra.run.dir={tmp_path}/ranks"], cwd=tmp_path, env=env, check=True)
    fedq(tmp_path, *options, f"hydra.run.dir={tmp_path}/alone")
    assert_same_run(tmp_path / "ranks", tmp_path / "alone")
    assert {"validation/loss", "per_client/accuracy_median"} <= metrics_of(tmp_path / "alone")[-1].keys()
