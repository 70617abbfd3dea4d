"""The command line, as people use it: real processes, real folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing, suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from command import fedq
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from test_datasets import FILES

from fedq.errors import FedqError
from fedq.simulation import checkpoint
from fedq.tracking.metrics import MetricsFile
from fedq.tracking.tensorboard import TensorBoard
from fedq.train import CONF

# a setting that trains in a moment; the hidden layer is above the threshold
SMALL = (
    "dataset=writers",
    "dataset.clients=6",
    "dataset.examples_per_client=10",
    "dataset.test_examples=50",
    "model=mlp",
    "run.rounds=3",
    "run.clients_per_round=3",
    "run.evaluate_every=2",
)
PHASES = ("train", "encode", "decode", "aggregate", "evaluate")


def run_folders(cwd: Path) -> list[Path]:
    return sorted(path.parent for path in cwd.rglob("metrics.jsonl"))


def metrics_of(folder: Path, times: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines if times else [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(sorted((folder / "checkpoints").glob("*.pt"))[-1])[0].weights


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics_of(a) == metrics_of(b)
    assert weights_equal(a, b)


def weights_equal(a: Path, b: Path) -> bool:
    first, second = weights_of(a), weights_of(b)
    return all(torch.equal(first[name], second[name]) for name in first | second)


def test_a_run_leaves_all_that_is_promised(tmp_path):
    done = fedq(tmp_path, *SMALL, "encoder=uint8", "run.seed=4")
    (folder,) = run_folders(tmp_path)
    assert folder.relative_to(tmp_path).parts[0] == "outputs"

    lines = metrics_of(folder, times=True)
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert ["test/accuracy" in line for line in lines] == [False, True, True]
    for i, line in enumerate(lines):
        names = {"train/loss", "train/accuracy", "clients", "clients_failed", "seconds"} | {
            f"seconds/{p}" for p in PHASES
        }
        assert names <= line.keys()
        # two dense layers at 8 bits with one range each, all other tensors in float32, and 48 bytes of frame
        message = 48 + (156_800 + 40_000) + 2 * 8 + 4 * (200 + 200 + 2000 + 10)
        assert line["broadcast_bits"] == line["aggregated_bits"] == 8 * 3 * message
        assert line["cumulative_broadcasted_bits"] == line["cumulative_aggregated_bits"] == 8 * 3 * message * (i + 1)

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["rounds"] == 3
    assert summary["seed"] == 4
    assert summary["final_test_accuracy"] == lines[2]["test/accuracy"]
    assert summary["best_test_accuracy"] == max(lines[1]["test/accuracy"], lines[2]["test/accuracy"])
    exact = 48 + 4 * 199_210
    assert summary["uncompressed_broadcasted_bits"] == 8 * 3 * 3 * exact
    assert summary["broadcast_ratio"] == summary["upload_ratio"] == pytest.approx(exact / message)
    assert summary["versions"]["torch"] == version("torch")

    (events,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    assert events.name.startswith("encoder=uint8")
    assert "run.seed=4" in events.name
    curves = EventAccumulator(str(events)).Reload()
    tutorial = {"loss", "sparse_categorical_accuracy", "cumulative_broadcasted_bits", "cumulative_aggregated_bits"}
    assert tutorial | {"train/loss", "test/accuracy"} <= set(curves.Tags()["scalars"])
    assert [e.value for e in curves.Scalars("loss")] == pytest.approx([line["train/loss"] for line in lines])
    # clients begin a round with the weights of earlier rounds; weights are tested after the round
    assert [e.step for e in curves.Scalars("loss")] == [0, 1, 2]
    assert [e.step for e in curves.Scalars("test/accuracy")] == [2, 3]
    hparams = curves.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(name in hparams for name in (b"run.seed", b"model", b"encoder", b"uint8"))

    assert checkpoint.load(folder / "checkpoints" / "round_000003.pt")[0].round == 3
    assert "round 3: train loss" in (folder / "train.log").read_text()
    assert (folder / ".hydra" / "config.yaml").exists()
    for word in ("test accuracy", "bytes down", "bytes up", "less than uncompressed"):
        assert word in done.stdout
    assert f"tensorboard --logdir {tmp_path}/outputs\n" in done.stdout
    assert f"{message / 1024:.2f} KiB down, {message / 1024:.2f} KiB up" in done.stdout
    assert done.stderr.count("round ") == 3  # without a terminal, each round has one line


def test_tensorboard_tells_the_runs_of_a_sweep_apart_by_what_it_set_however_deep(tmp_path):
    axes = ("run/guard=clip,none", "encoder.upload.stages.0.rounding=nearest,stochastic")
    whole = (
        "encoder.broadcast.stages=[{_target_:fedq.encoding.UniformQuantization,bits:7}],"
        "[{_target_:fedq.encoding.UniformQuantization,bits:6}]",
        "+encoder.broadcast.common_scale=true",
    )
    fedq(tmp_path, "-m", *SMALL, "run.rounds=1", *axes, *whole, f"hydra.sweep.dir={tmp_path}")
    told = []
    for events in tmp_path.rglob("events.out.tfevents.*"):
        metadata = EventAccumulator(str(events)).Reload().summary_metadata["_hparams_/session_start_info"]
        hparams = parse_session_start_info_plugin_data(metadata.plugin_data.content).hparams
        rounding = hparams["encoder.upload.stages[0].rounding"].string_value
        broadcast = hparams["encoder.broadcast.stages[0].bits"].number_value
        told.append((hparams["run/guard"].string_value, rounding, broadcast))
        choices = {"dataset": "writers", "model": "mlp", "encoder": "uint8"}
        assert {group: hparams[group].string_value for group in choices} == choices
        assert "run.seed" in hparams
        # TensorBoard shows five columns, and constants there would hide the keys that differ
        assert not {"client.lr", "encoder.threshold", "run.rounds", "run.evaluate_every"} & hparams.keys()
        assert not any("common_scale" in name for name in hparams)
    assert sorted(told) == sorted(product(("clip", "none"), ("nearest", "stochastic"), (6, 7)))


def test_the_same_seed_gives_the_same_whatever_runs_it(tmp_path):
    """One worker, two workers, a repeated run, a sweep's second job and the joblib launcher give the same result."""
    fedq(tmp_path / "..", *SMALL, "run.workers=1", f"hydra.run.dir={tmp_path}/one")
    fedq(tmp_path / "..", *SMALL, "run.workers=2", f"hydra.run.dir={tmp_path}/two")
    fedq(tmp_path / "..", "-m", *SMALL, "encoder.bits=2,8", f"hydra.sweep.dir={tmp_path}/sweep")
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    # joblib starts processes like its parent, so the parent must be a normal process
    command = [sys.executable, "-m", "fedq.train", "-m", *SMALL, "encoder.bits=8,2", *joblib]
    subprocess.run([*command, f"hydra.sweep.dir={tmp_path}/joblib"], cwd=tmp_path / "..", check=True, timeout=280)
    for other in ("two", "sweep/1", "joblib/0"):
        assert_same_run(tmp_path / "one", tmp_path / other)
    assert_same_run(tmp_path / "sweep/0", tmp_path / "joblib/1")
    assert metrics_of(tmp_path / "sweep/0") != metrics_of(tmp_path / "one")


def test_a_damaged_line_of_metrics_is_named_and_all_stays_as_it_is(tmp_path):
    command = (*SMALL, f"hydra.run.dir={tmp_path}/run")
    fedq(tmp_path, *command, "run.rounds=1")
    (tmp_path / "run/metrics.jsonl").write_text("[]\n")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".log"]
    kept = {path: path.read_bytes() for path in files}
    done = fedq(tmp_path, *command, "run.rounds=2", code=1)
    assert "run/metrics.jsonl is damaged in line 1; start afresh in a new folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert kept == {path: path.read_bytes() for path in files}


def test_a_sweep_has_a_folder_and_a_telling_name_for_each_job(tmp_path):
    fedq(tmp_path, *SMALL, "-m", "run.rounds=1", "encoder=uniform", "encoder.bits=2,4,8")
    folders = run_folders(tmp_path)
    assert [folder.name for folder in folders] == ["0", "1", "2"]
    names = [path.parent.name for folder in folders for path in sorted(folder.rglob("events*"))[:1]]
    assert [name.split("encoder.bits=")[1][0] for name in names] == ["2", "4", "8"]
    bits = [metrics_of(folder)[0]["aggregated_bits"] for folder in folders]
    assert bits == sorted(bits)
    assert len(set(bits)) == 3


def test_jobs_that_would_share_a_folder_do_not(tmp_path):
    done = fedq(tmp_path, "-m", *SMALL, "run.rounds=1", "run.seed=0,1", "hydra.sweep.subdir=same", code=1)
    assert "is of another run: run.seed was 0, not 1; set hydra.run.dir" in done.stderr
    (folder,) = run_folders(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["seed"]) == ("completed", 0)  # the summary of the first job is unchanged
    assert len(metrics_of(folder)) == 1


def test_a_sweep_is_checked_whole_before_its_first_job(tmp_path):
    done = fedq(tmp_path, "-m", *SMALL, "encoder.bits=8,eight", code=1)
    assert "encoder.bits: 'eight' is not allowed; it must be an integer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_folders(tmp_path)
    done = fedq(tmp_path, "-m", *SMALL, "run.seed=0,1", "+encoder.step=2", code=1)
    assert "encoder.step is not a key" in done.stderr
    assert not run_folders(tmp_path)
    done = fedq(tmp_path, "-m", *SMALL, "encoder=uint8,uint9", code=1)
    assert "Could not find 'encoder/uint9'" in done.stderr
    assert not run_folders(tmp_path)


def test_every_failing_job_of_a_sweep_is_told_and_the_others_finish(tmp_path):
    done = fedq(tmp_path, "-m", *SMALL, "run.clients_per_round=2,50,3,60", "run.rounds=1", code=1)
    statuses = [json.loads((f / "summary.json").read_text())["status"] for f in run_folders(tmp_path)]
    assert statuses == ["completed", "failed", "completed", "failed"]
    end = done.stderr[done.stderr.index("these jobs of the sweep failed") :]
    assert "50 is more than the 6 clients" in end
    assert "60 is more than the 6 clients" in end
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("encoder.bist=8", "encoder.bist is not a key; allowed here: axis, bits, block, broadcast, "),
        ("+encoder.step=2", "encoder.step is not a key; allowed here: threshold, broadcast, upload"),
        (
            "client.rate=1",
            "client.rate is not a key; allowed here: _target_, augment, batch_size, epochs, keep_optimizer, ",
        ),
        ("client.rate=1", ", and with +client.rate=… the other arguments of its class\n"),
        ("encoder=uint9", "Could not find 'encoder/uint9' Available options in 'encoder': adaptive_clip ans "),
        ("run.clients_per_round=7", "run.clients_per_round: 7 is more than the 6 clients"),
        ("server.lr=-1", "server: Invalid learning rate: -1"),
        ("~dataset._target_", "dataset._target_ is missing"),
        ("~run", "run: None is not allowed; it must be keys and values"),
    ],
)
def test_a_wrong_command_fails_with_one_line(tmp_path, argument, message):
    done = fedq(tmp_path, *([argument] if argument == "~run" else [*SMALL, argument]), code=1)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
    for folder in run_folders(tmp_path):
        assert metrics_of(folder) == []
        assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


def test_an_encoder_that_compresses_nothing_says_so(tmp_path):
    done = fedq(tmp_path, *SMALL, "run.rounds=1", "encoder=uint8", "encoder.threshold=1000000")
    for way in ("broadcast", "upload"):
        assert f"encoder.{way} compresses nothing: no tensor has more than encoder.threshold=1000000" in done.stderr


def test_training_that_diverges_ends_with_a_sentence_and_keeps_what_it_had(tmp_path):
    done = fedq(tmp_path, *SMALL, "client.lr=1e30", code=1)
    assert "0 of 3 clients sent a usable update" in done.stderr
    assert "holds NaN or infinity" in done.stderr
    assert "Traceback" not in done.stderr
    (folder,) = run_folders(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "usable update" in summary["error"]
    newest = max((folder / "checkpoints").glob("*.pt"))
    assert checkpoint.load(newest)[0].round == len(metrics_of(folder)) == summary["rounds"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk to fill can only be mounted by root")
def test_a_full_disk_ends_a_run_with_a_sentence_and_whole_lines(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = fedq(
            tmp_path, *SMALL, "run.rounds=2000", "run.checkpoint_every=4000", f"hydra.run.dir={disk}/run", code=1
        )
        assert "No space left on device" in done.stderr
        lines = metrics_of(disk / "run")  # every line is complete
        assert [line["round"] for line in lines] == list(range(len(lines)))
        assert len(lines) > 10
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def emnist_files(folder: Path, name: str, classes: int) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, examples in (("train", 8), ("test", 2)):
        with h5py.File(folder / f"{name}_{part}.h5", "w") as file:
            for i in range(4):
                group = file.create_group(f"examples/f{i:04d}_00")
                group["pixels"] = rng.random((examples, 28, 28), dtype=np.float32)
                group["label"] = rng.integers(classes, size=examples, dtype=np.int32)


TINY = ("run.rounds=1", "run.clients_per_round=2")
MLP = ("model=mlp", *TINY)
WRITERS = ("dataset=writers", "dataset.clients=4", "dataset.examples_per_client=4", "dataset.test_examples=10")
EVERY = {  # group → (overrides for training with its options, number of parts)
    "encoder": (("model=mlp", "run.rounds=2", "run.clients_per_round=2"), 4),
    "client": ((*MLP, "encoder=structured_mask"), 1),  # client=structured cannot train with every encoder
    "server": (MLP, 1),
    "run": (MLP, 1),
}


@pytest.mark.parametrize(
    ("group", "part"), [(group, part) for group, (_, parts) in EVERY.items() for part in range(parts)]
)
def test_every_option_of_a_group_trains(tmp_path, group, part):
    others, parts = EVERY[group]
    names = sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))[part::parts]
    small = tuple(o for o in SMALL if not o.startswith(("run.", "model", "dataset")))
    fedq(tmp_path, "-m", *WRITERS, *small, f"{group}={','.join(names)}", *others)
    assert_all_trained(tmp_path, len(names))


def test_every_model_trains(tmp_path):
    grey, text = ("mlp", "fedavg_cnn"), ("char_lstm", "word_lstm", "transformer")
    names = sorted(path.stem for path in Path(CONF, "model").glob("*.yaml"))
    pretrained = ("causal_lm", "sequence_classifier")  # test_presets.py trains these
    names = [name for name in names if name not in pretrained]
    colour = [name for name in names if name not in (*grey, *text)]
    for models, shape, *others in ((grey, "[1,28,28]"), (colour, "[3,32,32]"), (text, "null", "task=next_token")):
        dataset = f"+dataset={{_target_:random_examples.RandomExamples,shape:{shape}}}"
        fedq(tmp_path, "-m", f"model={','.join(models)}", "~dataset", dataset, *others, *TINY)
    assert_all_trained(tmp_path, len(names))


def test_what_guards_a_round_does_so_from_the_command_line(tmp_path):
    command = (*SMALL, "run.rounds=4", "run.clients_per_round=6")
    faults = ("run/faults=some", "run.faults.absent=0.5", "run.min_clients=3", "run.repeats=30")
    changes = {
        "plain": (),
        "guard": ("run/guard=clip", "run.guard.multiple=0.5"),
        "bf16": ("run.precision=bf16",),
        "faults": faults,
    }
    for name, own in changes.items():
        fedq(tmp_path, *command, *own, f"hydra.run.dir={tmp_path}/{name}")
    for name in ("guard", "bf16", "faults"):
        assert not weights_equal(tmp_path / name, tmp_path / "plain"), name
    lines = metrics_of(tmp_path / "faults")
    assert all(line["clients"] >= 3 for line in lines)
    assert sum(line["repeats"] for line in lines) > 0
    assert sum(line["clients_failed/silent"] for line in lines) > 0


def test_the_frontier_sends_a_hundred_times_fewer_bytes(tmp_path):
    """The first rounds have the longest messages: over 60 rounds there are 477 and 261 times fewer bytes."""
    small = ("run.rounds=3", "run.clients_per_round=3", "run.evaluate_every=3", "run.test_batch_size=500")
    fedq(tmp_path, "encoder=frontier", "dataset.clients=400", *small, f"hydra.run.dir={tmp_path}/run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["broadcast_ratio"] > 100
    assert summary["upload_ratio"] > 100
    # the first broadcast is empty, because no weight differs from the initial weights
    assert metrics_of(tmp_path / "run")[0]["broadcast_bits"] < 3 * 8 * 150


def test_every_dataset_trains(tmp_path):
    for name, classes in (("fed_emnist_digitsonly", 10), ("fed_emnist", 62)):
        emnist_files(tmp_path / "emnist", name, classes)
    fedq(tmp_path, "-m", "dataset=mnist5k,writers", *MLP)
    fedq(tmp_path, "-m", "dataset=emnist,emnist_digits", f"++dataset.path={tmp_path}/emnist", *MLP)
    small = ("task=next_token", "model._target_=tiny_models.Bigram", "client.max_examples=2")
    fedq(tmp_path, "dataset=shakespeare", "dataset.test_examples=10", *small, *TINY)
    names = {path.stem for path in Path(CONF, "dataset").glob("*.yaml")}
    # those of FILES are trained in test_datasets.py, and those with a pretrained tokenizer in test_presets.py
    assert_all_trained(tmp_path, len(names - FILES.keys() - {"shakespeare_tokens", "shakespeare_genres"}))


def assert_all_trained(cwd: Path, count: int) -> None:
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in run_folders(cwd)]
    assert [summary["status"] for summary in summaries] == ["completed"] * count


def test_what_json_has_no_word_for_is_null(tmp_path):
    with closing(MetricsFile(tmp_path)) as file:
        file.write({"round": 0, "test/loss": float("nan"), "train/loss": float("inf"), "clients": 3})
        assert metrics_of(tmp_path) == [{"round": 0, "test/loss": None, "train/loss": None, "clients": 3}]
        with pytest.raises(FedqError, match=r"metrics.jsonl has 1 rounds, the checkpoint 2; start afresh"):
            file.restore(tmp_path / "metrics.jsonl", 2)
        with pytest.raises(FedqError, match=r"has 0 rounds, the checkpoint 1"):
            file.restore(tmp_path / "elsewhere" / "metrics.jsonl", 1)


def test_curves_that_begin_again_are_forgotten(tmp_path):
    """A killed run resumes from an earlier round than the last round in TensorBoard's file."""
    for done, losses in (([], [3.0, 2.0]), ([], [4.0]), ([a_round(0, 4.0)], [5.0])):
        with TensorBoard(tmp_path, "run", {}, done) as board:
            for number, loss in enumerate(losses, start=len(done)):
                board.write(a_round(number, loss))
        assert len(list((tmp_path / "run").iterdir())) == 1
        for accumulator in (event_accumulator, plugin_event_accumulator):
            events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
            curve = events.Scalars("loss") if accumulator is event_accumulator else events.Tensors("loss")
            assert [event.step for event in curve] == list(range(len(done) + len(losses)))
    assert [event.value for event in EventAccumulator(str(tmp_path / "run")).Reload().Scalars("loss")] == [4.0, 5.0]


def a_round(number: int, loss: float, **more: float) -> dict[str, float]:
    sent = {f"cumulative_{way}_bits": 2.0**23 * (number + 1) for way in ("broadcasted", "aggregated")}
    return {"round": number, "train/loss": loss, "seconds": 1.0} | sent | more


def test_tensorboards_first_screen_shows_accuracy_and_bytes(tmp_path):
    tested = {"test/accuracy": 0.5, "test/loss": 1.5, "clients": 3, "a_new_metric": 7}
    tested |= {"seconds/simulated": 90.5, "cumulative_simulated_seconds": 90.5}
    with TensorBoard(tmp_path, "run", {}) as board:
        board.write(a_round(0, 3.0, **tested))
    curves = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = sorted(curves.Tags()["scalars"])
    first = [tag for tag in tags if tag.startswith("at_a_glance/")]
    assert tags[: len(first)] == first  # TensorBoard sorts groups by name, and opens the first two
    points = {tag.removeprefix("at_a_glance/"): curves.Scalars(tag)[0] for tag in first}
    assert {tag: (point.step, point.value) for tag, point in points.items()} == {
        "sent_MiB": (1, 2),
        "test_accuracy_by_KiB": (2048, 0.5),
        "test_accuracy_by_simulated_second": (90, 0.5),
        "test_accuracy": (1, 0.5),
        "test_loss": (1, 1.5),
    }
    groups = {tag.split("/")[0] for tag in tags}
    tutorial = {"loss", "cumulative_broadcasted_bits", "cumulative_aggregated_bits", "cumulative_simulated_seconds"}
    assert groups == tutorial | {"at_a_glance", "round", "seconds", "test", "train"}


def test_only_a_run_that_ended_well_is_called_a_success(tmp_path):
    for name in ("well", "badly"):
        with suppress(OSError), TensorBoard(tmp_path, name, {"client.lr": 0.1}) as board:
            board.write(a_round(0, 1.0))
            if name == "badly":
                raise OSError("the disk is gone")
    ended = [
        "_hparams_/session_end_info" in EventAccumulator(str(tmp_path / name)).Reload().summary_metadata
        for name in ("well", "badly")
    ]
    assert ended == [True, False]


def test_a_checkpoint_of_a_model_that_has_changed_is_told_of(tmp_path):
    fedq(tmp_path, *SMALL, "hydra.run.dir=run")
    newest = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    content = torch.load(newest, weights_only=True)
    content["weights"]["dense1.bias"] = content["weights"]["dense1.bias"][:-1].clone()
    torch.save(content, newest)
    done = fedq(tmp_path, *SMALL, "run.rounds=4", "hydra.run.dir=run", code=1)
    assert "its checkpoint is of another model: the tensors differ" in done.stderr
    content["weights"]["dense1.bias"] = torch.zeros(200)
    torch.save(content | {"upload": {"dense1.weight": {0: {"x": torch.ones(1)}}}}, newest)
    done = fedq(tmp_path, *SMALL, "run.rounds=4", "hydra.run.dir=run", code=1)
    assert "its checkpoint holds another state of encoder.upload" in done.stderr


def test_help_names_the_groups_and_three_commands(tmp_path):
    text = fedq(tmp_path, "--help").stdout
    for word in (
        "dataset:",
        "encoder: adaptive_clip, ans,",
        "model:",
        "client:",
        "server:",
        "run: default, tutorial",
    ):
        assert word in text
    assert text.count("python -m fedq.train") == 3
    assert 'eval "$(fedq-train -sc install=bash)"' in text


def test_real_writers_cost_what_the_tutorial_should(tmp_path):
    """The messages take 507.62 Mibit a round each way in float32, and at most 128.42 with 8 bits."""
    files = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist_writers"
    if not files.is_dir():
        pytest.skip("the real writers' files are not here")
    arguments = ("run=tutorial", "run.rounds=1", "dataset=emnist_digits", f"dataset.path={files}")
    fedq(tmp_path, "-m", "encoder=float32,uint8", *arguments)
    exact, compressed = (metrics_of(folder)[0] for folder in run_folders(tmp_path))
    for way in ("broadcast_bits", "aggregated_bits"):
        assert round(exact[way] / 2**20, 2) == 507.62
        assert compressed[way] / 2**20 <= 128.42


def test_a_sweep_given_again_skips_what_is_finished_and_goes_on_with_the_rest(tmp_path):
    command = ("-m", *SMALL, "run.seed=0,1", "run.checkpoint_every=1", f"hydra.sweep.dir={tmp_path}/sweep")
    fedq(tmp_path, *command)
    kept = {name: (tmp_path / "sweep" / "0" / name).read_bytes() for name in ("summary.json", "metrics.jsonl")}
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "sweep" / "1", whole)
    # the files of a second job that was killed after its first round: no summary, half a line, a damaged later
    # checkpoint
    second = tmp_path / "sweep" / "1"
    (second / "summary.json").unlink()
    lines = (second / "metrics.jsonl").read_text().splitlines(keepends=True)
    (second / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    (second / "checkpoints" / "round_000003.pt").write_bytes(b"damaged")
    done = fedq(tmp_path, *command)
    assert "sweep/0 holds this run, finished: nothing to do" in done.stderr
    assert "round_000003.pt cannot be used" in done.stderr
    assert "resumed after 2 rounds of" in done.stderr
    assert kept == {name: (tmp_path / "sweep" / "0" / name).read_bytes() for name in kept}
    assert_same_run(second, whole)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (second, whole)]
    for summary in summaries:
        summary.pop("seconds")
        summary["config"].pop("run")
    assert summaries[0] == summaries[1]
    (events,) = {path.parent for path in second.rglob("events.out.tfevents.*")}
    curves = EventAccumulator(str(events)).Reload()
    assert [e.step for e in curves.Scalars("train/loss")] == [0, 1, 2]
    assert [e.step for e in curves.Scalars("test/accuracy")] == [2, 3]


def test_a_rank_tells_how_it_ended(tmp_path, monkeypatch):
    """A process of torchrun exits at once, but must not lose its output or its exit code."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    done = fedq(tmp_path, *SMALL, "run.rounds=1")
    assert "test accuracy" in done.stdout and "round 1: " in done.stderr
    done = fedq(tmp_path, *SMALL, "run.clients_per_round=7", code=1)
    assert done.stderr.count("run.clients_per_round: 7 is more than the 6 clients") == 1
    done = fedq(tmp_path, *SMALL, "encoder=uint9", code=1)
    assert "uint9" in done.stderr.splitlines()[-1]


def test_a_run_goes_on_longer_and_from_another_folder(tmp_path):
    command = (*SMALL, "encoder=top_k", "encoder.upload.error_feedback=true")
    fedq(tmp_path, *command, "run.rounds=2", f"hydra.run.dir={tmp_path}/short")
    fedq(tmp_path, *command, f"hydra.run.dir={tmp_path}/whole")
    fedq(tmp_path, *command, f"run.resume={tmp_path}/short", f"hydra.run.dir={tmp_path}/other")
    fedq(tmp_path, *command, f"hydra.run.dir={tmp_path}/short", "run.residual_memory=0")
    assert_same_run(tmp_path / "other", tmp_path / "whole")
    assert_same_run(tmp_path / "short", tmp_path / "whole")
    # a refused command changes no file of the folder
    files = [path for path in (tmp_path / "short").rglob("*") if path.is_file() and path.suffix != ".log"]
    kept = {path: path.read_bytes() for path in files}
    done = fedq(tmp_path, *command, "run.resume=never", f"hydra.run.dir={tmp_path}/short", code=1)
    assert "belongs to another run" in done.stderr
    done = fedq(tmp_path, *command, "client.lr=0.5", f"hydra.run.dir={tmp_path}/short", code=1)
    assert "is of another run: client.lr was 0.1, not 0.5" in done.stderr
    from_other = (f"run.resume={tmp_path}/other", f"hydra.run.dir={tmp_path}/short")
    done = fedq(tmp_path, *command, "client.lr=0.5", *from_other, code=1)
    assert "is of another run: client.lr was 0.1, not 0.5" in done.stderr
    fewer = fedq(tmp_path, *command, "run.rounds=1", f"hydra.run.dir={tmp_path}/short")
    assert "finished: nothing to do" in fewer.stderr
    assert kept == {path: path.read_bytes() for path in kept}
    # TensorBoard shows each as one run of three rounds, also if the run began in another folder
    for folder in ("short", "other"):
        (events,) = (tmp_path / folder).glob("encoder=*")
        assert [event.step for event in EventAccumulator(str(events)).Reload().Scalars("train/loss")] == [0, 1, 2]


def test_a_run_goes_on_where_its_data_was_moved_but_none_is_taken_for_done(tmp_path):
    emnist_files(tmp_path / "here", "fed_emnist_digitsonly", 10)
    command = ("dataset=emnist_digits", *MLP, "run.evaluate_every=1", "hydra.run.dir=run")
    fedq(tmp_path, *command, "run.rounds=1", f"dataset.path={tmp_path}/here")
    (tmp_path / "here").rename(tmp_path / "there")
    done = fedq(tmp_path, *command, "run.rounds=2", f"dataset.path={tmp_path}/there")
    assert "resumed after 1 rounds" in done.stderr
    (tmp_path / "there").rename(tmp_path / "elsewhere")  # the same path may now hold other data
    done = fedq(tmp_path, *command, "run.rounds=2", f"dataset.path={tmp_path}/elsewhere", code=1)
    assert f"dataset.path was {tmp_path}/there, not {tmp_path}/elsewhere" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_way_to_go_on(tmp_path, number):
    command = [sys.executable, "-m", "fedq.train", *SMALL, "run.rounds=100000", "run.checkpoint_every=100000"]
    folder = f"hydra.run.dir={tmp_path}/run"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([*command, folder], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as running:
        while "round 3: " not in running.stderr.readline():
            pass
        running.send_signal(number)
        rest = running.stderr.read()
    assert running.returncode == 128 + number
    assert f"to resume, give the same command again with {folder}" in rest
    assert "the run stops at the next client; once more, and it stops at once" in rest
    assert "Traceback" not in rest
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))[-1]
    rounds = checkpoint.load(newest)[0].round
    assert rounds == len(metrics_of(tmp_path / "run")) >= 3
    fedq(tmp_path, *SMALL, f"run.rounds={rounds + 1}", "run.checkpoint_every=100000", folder)
    fedq(tmp_path, *SMALL, f"run.rounds={rounds + 1}", f"hydra.run.dir={tmp_path}/whole")
    assert weights_equal(tmp_path / "run", tmp_path / "whole")


def test_clients_train_parts_of_the_model_where_the_command_says_so(tmp_path):
    parts = (*SMALL, "run/submodel=some", "run.submodel.keep=0.5", "run.evaluate_every=1")
    fedq(tmp_path, *parts, f"hydra.run.dir={tmp_path}/whole")
    fedq(tmp_path, *parts, "run.rounds=1", "run.workers=1", f"hydra.run.dir={tmp_path}/resumed")
    fedq(tmp_path, *parts, "run.workers=2", f"hydra.run.dir={tmp_path}/resumed")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    # 78,400 symbols, 2 side values and 11,210 exact parameters (10,000 are no more than the threshold), of 199,210
    message = 48 + 78_400 + 2 * 4 + 4 * (100 + 100 * 100 + 100 + 10 * 100 + 10)
    assert summary["broadcasted_bits"] == summary["aggregated_bits"] == 3 * 3 * 8 * message
    assert summary["upload_ratio"] == summary["broadcast_ratio"] == (48 + 4 * 199_210) / message
    done = fedq(tmp_path, *parts, "client=structured", "encoder=structured_mask", code=1)
    assert "run.submodel: client.structured must be false" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = fedq(tmp_path, *parts, "run.submodel.keep=1.5", code=1)
    assert "run.submodel: keep must be above 0 and at most 1, not 1.5" in done.stderr


def test_two_runs_at_once_do_not_share_a_folder(tmp_path):
    with closing(MetricsFile(tmp_path)):
        done = fedq(tmp_path, *SMALL, f"hydra.run.dir={tmp_path}", code=1)
    assert f"another process runs in {tmp_path}" in done.stderr
    assert not (tmp_path / "summary.json").exists()


def test_a_run_goes_on_after_numbers_that_json_has_no_word_for(tmp_path):
    arguments = (*SMALL, "server.lr=1e20", "run.evaluate_every=1")
    fedq(tmp_path, *arguments, "run.rounds=1", f"hydra.run.dir={tmp_path}/a")
    assert metrics_of(tmp_path / "a")[0]["test/loss"] is None
    again = (*arguments, "run.rounds=2", f"run.resume={tmp_path}/a", f"hydra.run.dir={tmp_path}/b")
    done = fedq(tmp_path, *again, code=1)  # clients cannot train from diverged weights
    assert "0 of 3 clients sent a usable update" in done.stderr
    assert "bug" not in done.stderr
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")


def test_fewer_rounds_than_are_done_are_refused(tmp_path):
    fedq(tmp_path, *SMALL, "run.rounds=4", "run.evaluate_every=4", f"hydra.run.dir={tmp_path}/a")
    other = f"hydra.run.dir={tmp_path}/b"
    done = fedq(tmp_path, *SMALL, "run.rounds=2", "run.evaluate_every=4", f"run.resume={tmp_path}/a", other, code=1)
    assert f"run.rounds: 4 rounds are done already, in {tmp_path}/a; ask for more than 2" in done.stderr
    (tmp_path / "a" / "summary.json").write_text("[]\n")  # a file of another program is ignored
    done = fedq(tmp_path, *SMALL, "run.rounds=4", "run.evaluate_every=4", f"hydra.run.dir={tmp_path}/a")
    assert "resumed after 4 rounds of" in done.stderr


def test_a_finished_run_is_not_one_with_other_demands_on_its_cohorts(tmp_path):
    command = (*SMALL, "run.rounds=1", f"hydra.run.dir={tmp_path}/a")
    fedq(tmp_path, *command)
    done = fedq(tmp_path, *command, "run.min_clients=2", code=1)
    assert "is of another run: run.min_clients was 1, not 2" in done.stderr


@pytest.mark.parametrize(("threshold", "refused"), [(0, True), (100, False)])
def test_nan_is_sent_only_where_it_is_one(tmp_path, threshold, refused):
    faults = [
        "run/faults=some",
        *(f"run.faults.{name}=0" for name in ("absent", "crash", "late", "damaged", "replayed")),
    ]
    command = (*SMALL, *faults, "run.faults.nan=1", "run.rounds=1", f"encoder.threshold={threshold}")
    done = fedq(tmp_path, *command, code=1)
    sentence = "run.faults.nan must be 0 with this model and encoder: a message ends in 'dense3.bias'"
    assert (sentence in done.stderr) == refused
    assert ("a value is NaN or infinite" in done.stderr) != refused


def test_a_sweep_tells_of_jobs_in_folders_of_any_depth(tmp_path):
    command = ("-m", *SMALL, "client.lr=1e30,0.1", f"hydra.sweep.dir={tmp_path}/sweep")
    done = fedq(tmp_path, *command, "hydra.sweep.subdir='a/${hydra.job.num}'", "run.accuracy_floor=0", code=1)
    assert "these jobs of the sweep failed" in done.stderr
    assert f"{tmp_path}/sweep/a/0: " in done.stderr
    assert f"client.lr=0.1 in {tmp_path}/sweep/a/1, " in done.stdout


def test_a_job_that_is_refused_does_not_end_a_sweep_of_ranks(tmp_path):
    # first a value that a class refuses, then parts that do not fit together, then a run
    structured = ("client=structured,sgd", "run.clients_per_round=1000,3", "client.lr=0.1")
    command = ("-m", *SMALL, *structured, f"hydra.sweep.dir={tmp_path}/sweep")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "fedq.train", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert done.stderr.count("run.clients_per_round: 1000 is more than") >= 1
    assert done.stderr.count("client.structured: the upload of") >= 1
    summaries = [json.loads((tmp_path / "sweep" / str(job) / "summary.json").read_text()) for job in range(4)]
    assert [summary["status"] for summary in summaries] == ["failed", "failed", "failed", "completed"]
