"""The comparison of runs: reads, groups, names and plots runs, and leaves out unfinished and damaged runs."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import fedq
from matplotlib.figure import Figure
from matplotlib.image import imread
from omegaconf import OmegaConf

from fedq import compare
from fedq.compare import caption, distinguishing_columns, show, table, value
from fedq.errors import FedqError
from fedq.runs import find_runs, group_by_seed, read_run, read_runs

ENCODERS: dict[str, dict[str, Any]] = {
    "float32": {"threshold": 10000, "broadcast": {"stages": []}},
    "uniform": {
        "threshold": 10000,
        "bits": 8,
        "broadcast": {"bits": "${encoder.bits}", "stages": [{"_target_": "Uniform", "bits": "${...bits}"}]},
    },
}
ENCODERS["uint8"] = ENCODERS["uniform"]
RUNS = {"default": {"rounds": 3, "evaluate_every": 1}, "tutorial": {"rounds": 3, "evaluate_every": 2}}


def write_run(
    folder: Path,
    overrides: Sequence[str] = (),
    accuracies: Sequence[float | None] = (0.5, 0.9, 0.8),
    down: int = 8192,
    up: int = 4096,
    **summary: Any,
) -> Path:
    """Writes a run's folder as fedq.train does, with `down` and `up` bits a round. Each round takes a second more."""
    choices = {"run": "default", "encoder": "uint8", "dataset": "mnist5k", "hydra/help": "fedq", "run/network": "none"}
    choices |= dict(o.split("=") for o in overrides if o.split("=")[0] in choices)
    tree = {
        "dataset": {"name": choices["dataset"], "path": None, "seed": 0},
        "encoder": ENCODERS[choices["encoder"]],
        "client": {"lr": 0.1, "betas": [0.9, 0.99]},
        "run": RUNS[choices["run"]] | {"rounds": len(accuracies), "seed": 0, "workers": "auto"},
    }
    config = OmegaConf.merge(tree, OmegaConf.from_dotlist([o for o in overrides if o.split("=")[0] not in choices]))
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(config, folder / ".hydra/config.yaml")
    hydra = {"hydra": {"runtime": {"choices": choices}, "overrides": {"task": list(overrides)}}}
    OmegaConf.save(OmegaConf.create(hydra), folder / ".hydra/hydra.yaml")
    lines = []
    for number, accuracy in enumerate(accuracies):
        line = {
            "round": number,
            "train/loss": 2.0 - number,
            "train/accuracy": 0.1 * number,
            "broadcast_bits": down,
            "aggregated_bits": up,
            "cumulative_broadcasted_bits": down * (number + 1),
            "cumulative_aggregated_bits": up * (number + 1),
            "seconds": 1.0 + number,
        }
        lines.append(line | ({} if accuracy is None else {"test/accuracy": accuracy}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tested = [accuracy for accuracy in accuracies if accuracy is not None]
    values = {
        "status": "completed",
        "rounds": len(lines),
        "final_test_accuracy": tested[-1],
        "best_test_accuracy": max(tested),
        "broadcasted_bits": down * len(lines),
        "aggregated_bits": up * len(lines),
        "broadcast_ratio": 3.5,
        "upload_ratio": 7.25,
        "seconds": float(sum(accumulate(1.0 for _ in lines))),
        "seed": config.run.seed,
    }
    (folder / "summary.json").write_text(json.dumps(values | summary))
    return folder


def columns_of(*folders: Path) -> list[str]:
    return distinguishing_columns([read_run(folder) for folder in folders])


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["fedq-compare", *map(str, arguments)])
    compare.main()


# ---- the numbers


def test_the_numbers_over_seeds_are_those_computed_by_hand(tmp_path: Path) -> None:
    for seed, accuracies in enumerate([(0.5, 0.96, 0.95), (0.5, 0.6, 0.97), (0.5, 0.7, 0.9)]):
        write_run(tmp_path / str(seed), [f"run.seed={seed}"], accuracies, upload_ratio=7.0 + seed)
    groups = group_by_seed(read_runs([tmp_path]))
    assert table(groups, ["encoder"], target=0.95) == [
        {
            "encoder": "uint8",
            "runs": "3",
            "final accuracy": "94.00 % ± 3.61",  # 95, 97, 90: deviations 1, 3, −4, so √(26/2)
            "best accuracy": "94.33 % ± 3.79",  # 96, 97, 90: deviations 5/3, 8/3, −13/3, so √(43/3)
            "broadcast": "3.00 KiB 3.50×",  # 3 rounds of 8192 bits
            "upload": "1.50 KiB 8.00×",  # the ratios 7, 8, 9
            "bytes to 95 %": "3.75 KiB",  # 12,288 bits a round, both ways: 2 and 3 rounds
            "rounds to 95 %": "2.5 (2 of 3)",
            "s/round": "2.00",
        }
    ]


def test_simulated_hours_are_shown_with_their_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = ["run.network._target_=x.Network", "run.network.down=20", "run.network.trace=null"]
    folder = write_run(tmp_path / "a", [*network, "run/network=mobile"], (0.5, 0.9, 0.8))
    write_run(tmp_path / "b", ["run.seed=1"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"cumulative_simulated_seconds": 1800.0 * number} for number, line in enumerate(lines, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = table([[read_run(folder)], [read_run(tmp_path / "b")]], ["encoder"], target=0.85)
    assert [row["simulated hours to 85 %"] for row in rows] == ["1", "–"]
    assert [row["simulated s/round"] for row in rows] == ["1.8e+03", "–"]
    said = caption([[read_run(folder)]])
    assert said.startswith("simulated time:\nmobile: down=20\nRates are in Mbit/s") and "Assumed: " in said
    assert caption([[read_run(tmp_path / "b")]]) == ""
    panels = []
    monkeypatch.setattr(compare, "save", lambda figure, *_: panels.append([a.get_xlabel() for a in figure.axes]))
    for runs in ([read_run(folder)], [read_run(folder), read_run(tmp_path / "b")]):
        compare.draw([[run] for run in runs], ["encoder"], 0.85, tmp_path / "c.png")
    both = ["rounds done", "bytes sent, both ways, all clients"]
    assert panels == [[*both, "simulated hours"], both]


def test_one_run_has_no_deviation_and_a_target_never_reached_has_a_dash(tmp_path: Path) -> None:
    (row,) = table([[read_run(write_run(tmp_path / "a"))]], ["encoder"], target=0.91)
    assert (row["final accuracy"], row["best accuracy"]) == ("80.00 %", "90.00 %")
    assert (row["bytes to 91 %"], row["rounds to 91 %"]) == ("–", "–")


def test_rounds_that_were_not_tested_count_on_the_way_to_the_target(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", accuracies=(None, 0.5, None, 0.7)))
    assert run.curve("test/accuracy") == {2: 0.5, 4: 0.7}
    assert run.curve("cumulative_bits") == {1: 12288, 2: 24576, 3: 36864, 4: 49152}
    assert run.reaches(0.5) == (2, 24576)
    assert run.reaches(0.7) == (4, 49152)
    assert run.reaches(0.71) is None


# ---- groups of runs, and keys that distinguish them


def test_runs_that_differ_by_seed_workers_and_what_follows_from_the_seed_are_one_group(tmp_path: Path) -> None:
    write_run(tmp_path / "0", ["run.seed=0", "dataset.seed=${run.seed}"])
    write_run(tmp_path / "1", ["run.seed=1", "dataset.seed=${run.seed}", "run.workers=2"])
    write_run(tmp_path / "2", ["run.seed=2", "dataset.seed=${run.seed}", "client.lr=0.2"])
    groups = group_by_seed(read_runs([tmp_path]))
    assert [[run.folder.name for run in group] for group in groups] == [["0", "1"], ["2"]]
    assert distinguishing_columns([group[0] for group in groups]) == ["client.lr"]


def test_a_choice_hides_the_keys_that_follow_from_it(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", ["encoder=float32"]), write_run(tmp_path / "b", ["encoder=uint8"])
    c = write_run(tmp_path / "c", ["encoder=uint8", "run=tutorial"])
    assert columns_of(a, b) == ["encoder"]
    assert columns_of(b, c) == ["run"]
    assert columns_of(a, b, c) == ["run", "encoder"]


def test_a_knob_is_shown_if_it_was_set_or_varies_and_what_refers_to_it_is_not(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", ["encoder=float32"])
    b = write_run(tmp_path / "b", ["encoder=uniform", "encoder.bits=4"])
    c = write_run(tmp_path / "c", ["encoder=uniform", "encoder.bits=2"])
    d = write_run(tmp_path / "d", ["encoder=uniform", "encoder.broadcast.bits=2"])
    assert columns_of(a, b) == ["encoder", "encoder.bits"]
    assert columns_of(b, c) == ["encoder.bits"]
    assert columns_of(a, b, c) == ["encoder", "encoder.bits"]
    assert columns_of(a, d) == ["encoder", "encoder.broadcast.bits"]
    assert columns_of(b, d) == ["encoder.bits", "encoder.broadcast.bits"]
    assert [value(read_run(folder), "encoder.bits") for folder in (a, b, c)] == ["–", "4", "2"]


def test_runs_on_data_that_was_moved_are_one_group(tmp_path: Path) -> None:
    for seed, path in enumerate(["/old", "/old", "/new"]):
        write_run(tmp_path / str(seed), ["dataset=emnist_digits", f"dataset.path={path}", f"run.seed={seed}"])
    write_run(tmp_path / "3", ["dataset=emnist_digits", "dataset.path=/new", "run.seed=3", "client.lr=0.2"])
    groups = group_by_seed(read_runs([tmp_path]))
    assert [[run.summary["seed"] for run in group] for group in groups] == [[0, 1, 2], [3]]
    assert distinguishing_columns([group[0] for group in groups]) == ["client.lr"]


def test_values_are_shown_as_a_command_line_would_write_them(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", ["client.momentum=null"])
    b = write_run(tmp_path / "b", ["client.momentum=0.9", "client.betas=[0.5,0.9]"])
    assert columns_of(a, b) == ["client.betas", "client.momentum"]
    assert [value(read_run(a), column) for column in ("client.betas", "client.momentum")] == ["[0.9, 0.99]", "null"]


def test_where_a_datasets_files_lie_does_not_tell_apart_what_the_choice_does(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", ["dataset=emnist_digits", "dataset.path=/x"])
    assert columns_of(a, b) == ["dataset"]


def test_runs_alike_are_told_by_their_encoder(tmp_path: Path) -> None:
    assert columns_of(write_run(tmp_path / "a")) == ["encoder"]


# ---- runs that are read, and runs that are left out


def test_runs_are_found_at_any_depth_once_and_in_the_order_of_a_sweeps_jobs(tmp_path: Path) -> None:
    for job in (0, 2, 10):
        write_run(tmp_path / f"multirun/day/time/{job}", [f"run.seed={job}"])
    write_run(tmp_path / "day/time")
    found = find_runs([tmp_path, tmp_path / "day/../multirun/day", tmp_path / "day/time"])
    assert [str(folder.relative_to(tmp_path)) for folder in found] == [
        "day/time",
        "multirun/day/time/0",
        "multirun/day/time/2",
        "multirun/day/time/10",
    ]


def test_a_run_done_again_is_no_second_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write_run(tmp_path / "1"), write_run(tmp_path / "2", ["run.workers=3"])
    assert [run.folder for run in read_runs([tmp_path])] == [new]
    assert capsys.readouterr().err == f"fedq: left out {old}: same configuration and seed as {new}\n"


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text())) and None


def summary(**changes: Any) -> Callable[[Path], None]:
    return edit("summary.json", lambda text: json.dumps(json.loads(text) | changes))


def metric(number: int, **changes: Any) -> Callable[[Path], None]:
    def change(text: str) -> str:
        lines = text.splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | {k.replace("_of_", "/"): v for k, v in changes.items()})
        return "\n".join(lines)

    return edit("metrics.jsonl", change)


def never_began(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").unlink()


LEFT_OUT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "never began": (never_began, "unfinished: the run did not begin"),
    "still running": (lambda folder: (folder / "summary.json").unlink(), "unfinished: it has no summary.json"),
    "failed": (summary(status="failed", error="two\nlines"), "unfinished: failed two lines"),
    "interrupted": (summary(status="interrupted"), "unfinished: interrupted"),
    "broken summary": (edit("summary.json", lambda text: text[:20]), "damaged: summary.json cannot be read: "),
    "a summary of another kind": (edit("summary.json", lambda _: "[]"), "damaged: its files lack a value"),
    "no metrics": (lambda folder: (folder / "metrics.jsonl").unlink(), "damaged: it has no metrics.jsonl"),
    "half a line": (edit("metrics.jsonl", lambda text: text[:-20]), "damaged: metrics.jsonl cannot be read: "),
    "not text": (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe"), "damaged: metrics.jsonl cannot"),
    "no choices": (lambda folder: (folder / ".hydra/hydra.yaml").unlink(), "damaged: it has no hydra.yaml"),
    "no config": (lambda folder: (folder / ".hydra/config.yaml").unlink(), "damaged: it has no config.yaml"),
    "broken config": (edit(".hydra/config.yaml", lambda _: "a: [1,\nb"), "damaged: config.yaml cannot be read: "),
    "a lost reference": (
        edit(".hydra/config.yaml", lambda text: text.replace("${encoder.bits}", "${no.such}")),
        "damaged: config.yaml cannot be read: ",
    ),
    "a broken reference": (
        edit(".hydra/config.yaml", lambda text: text.replace("${encoder.bits}", "${encoder.bits")),
        "damaged: config.yaml cannot be read: ",
    ),
    "a missing round": (
        edit("metrics.jsonl", lambda text: "".join(text.splitlines(keepends=True)[::2])),
        "damaged: metrics.jsonl must have each round once (2 lines; of 3 rounds, summary.json has 3)",
    ),
    "fewer rounds than configured": (
        edit(".hydra/config.yaml", lambda text: text.replace("rounds: 3", "rounds: 4")),
        "damaged: metrics.jsonl must have each round once (3 lines; of 4 rounds, summary.json has 3)",
    ),
    "fewer rounds told": (summary(rounds=2), "damaged: metrics.jsonl must have each round once"),
    "no round at all": (edit("metrics.jsonl", lambda _: ""), "damaged: metrics.jsonl must have each round once"),
    "other bits in the summary": (summary(broadcasted_bits=1), "damaged: broadcast_bits and cumulative_broadcasted"),
    "other bits in a round": (metric(1, aggregated_bits=1), "damaged: aggregated_bits and cumulative_aggregated_bits"),
    "other accuracy": (metric(2, test_of_accuracy=0.7), "damaged: test/accuracy of metrics.jsonl and summary.json do"),
    "other best accuracy": (metric(1, test_of_accuracy=0.99), "damaged: test/accuracy of metrics.jsonl and summary"),
    "no ratio": (summary(upload_ratio=None), "damaged: upload_ratio of summary.json is None, not a number"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_unfinished_and_damaged_runs_are_named_in_a_line_and_left_out(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, reason = LEFT_OUT[case]
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad", ["run.seed=1"])
    assert len(read_runs([tmp_path])) == 2
    damage(bad)
    assert [run.folder for run in read_runs([tmp_path])] == [good]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedq: left out {bad}: {reason}")


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedqError, match=r"^no completed run in .*empty$"):
        read_runs([tmp_path / "empty"])


# ---- tables and pictures


def test_a_table_wider_than_the_terminal_is_stacked_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", ["encoder=float32", f"run.seed={seed}"])
        write_run(tmp_path / f"b{seed}", ["encoder=uint8", "client.lr=0.25", f"run.seed={seed}"])
    groups = group_by_seed(read_runs([tmp_path]))
    columns = distinguishing_columns([group[0] for group in groups])
    rows = table(groups, columns, target=0.9)
    lines: dict[int, list[str]] = {}
    for width in (80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True)
            show(rows, columns)
        lines[width] = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
        assert max(map(len, lines[width])) <= width
        for row in rows:
            assert all(any(cell in line for line in lines[width]) for cell in row.values())
    assert "encoder=uint8" in "".join(lines[80])
    assert "encoder=uint8" not in "".join(lines[160])
    monkeypatch.setenv("COLUMNS", "80")
    show(rows, columns)  # output into a pipe has the wide form, whatever the terminal
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [line.split() for line in lines[160]]


def test_no_cell_is_broken_however_narrow_the_terminal_and_long_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", ["encoder=float32", "dataset=" + "a_dataset_with_a_name_as_long_as_this_one"])
    write_run(tmp_path / "b", ["encoder=uint8", "client.lr=0.25"])
    runs = read_runs([tmp_path])
    columns = distinguishing_columns(runs)
    rows = table([[run] for run in runs], columns, target=0.9)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for width in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        show(rows, columns)
        lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
        assert max(map(len, lines)) <= width
        for text in {text for row in rows for pair in row.items() for text in pair}:
            assert any(text in line for line in lines), text


def test_curves_are_the_mean_and_the_band_one_standard_deviation(tmp_path: Path) -> None:
    for seed, accuracies in enumerate([(0.5, None, 0.9), (0.6, None, 0.7)]):
        write_run(tmp_path / str(seed), [f"run.seed={seed}"], accuracies)
    write_run(tmp_path / "2", ["encoder=float32"], (0.1, 0.2, 0.3), down=32768, up=32768)
    groups = group_by_seed(read_runs([tmp_path]))
    left, right = Figure().subplots(1, 2)
    compare.plot(left, groups, ["encoder"], "test/accuracy")
    compare.plot(right, groups, ["encoder"], "test/accuracy", x="cumulative_bits")
    first, second = left.get_lines()
    np.testing.assert_allclose(first.get_xydata(), [(1, 0.55), (3, 0.8)])
    np.testing.assert_allclose(second.get_xydata(), [(1, 0.1), (2, 0.2), (3, 0.3)])
    band = left.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([band.y0, band.y1], [0.55 - 0.0707107, 0.8 + 0.1414214], rtol=1e-6)
    np.testing.assert_allclose(right.get_lines()[0].get_xdata(), [12288, 36864])
    np.testing.assert_allclose(right.get_lines()[1].get_xdata(), [65536, 131072, 196608])
    assert [line.get_label() for line in (first, second)] == ["encoder=uint8 (2 runs)", "encoder=float32"]
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_marker() != second.get_marker()


def test_the_command_prints_the_table_and_writes_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", ["encoder=float32"], (0.1, 0.5, 0.8))
    write_run(tmp_path / "b", ["encoder=uint8"], (0.1, 0.4, 0.7), down=2048, up=1024)
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "a", "b", "--target", "0.75")
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines() if line[0] in "fu"] == ["float32", "uint8"]
    assert "rounds to 75 %" in out
    assert out.endswith("picture in compare.png\n")
    picture = imread(tmp_path / "compare.png")
    assert picture.shape == (787, 1650, 4)  # 4.5 inches and three lines of legend by 11 inches, at 150 dots an inch
    for half in (picture[:, :825], picture[:, 825:]):
        drawn = (half[..., :3].std(axis=2) > 0.1).mean()  # only the curves are not grey
        assert 0.001 < drawn < 0.2
    call(monkeypatch, "a", "--output", "other.png")
    assert imread(tmp_path / "other.png").shape[1] == 1650


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing"], "fedq: missing does not exist"),
        (["a/summary.json"], "fedq: a/summary.json is not a folder"),
        (["a", "missing"], "fedq: missing does not exist"),
        (["empty"], "fedq: no completed run in empty"),
        (["a", "--target", "95"], "fedq: --target: 95.0 is not an accuracy, such as 0.95"),
        (["a", "--output", "missing/x.png"], "fedq: missing/x.png cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, *arguments)
    assert error.value.code == sentence  # the code is a text: Python prints the text to stderr and exits with 1


def test_reading_waits_for_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    code = (
        "import sys, pathlib, fedq.compare, fedq.runs as c; c.read_runs([pathlib.Path(sys.argv[1])]); "
        "sys.exit(str({'torch', 'matplotlib'} & set(sys.modules) or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "0\n")


def test_the_tutorials_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.tutorial import figure

    write_run(tmp_path / "a", ["encoder=float32"], down=2**20, up=2**20)
    write_run(tmp_path / "b", ["encoder=uint8"], down=2**18, up=2**19)
    monkeypatch.setattr(sys, "argv", ["figure", str(tmp_path), "--output", str(tmp_path / "figure.png")])
    drawn: list[Figure] = []
    monkeypatch.setattr(figure, "save", lambda *arguments: (drawn.append(arguments[0]), compare.save(*arguments)))
    figure.main()
    panels = {axes.get_ylabel(): [list(line.get_ydata()) for line in axes.get_lines()] for axes in drawn[0].axes}
    assert panels == {
        "train loss": [[2, 1, 0]] * 2,
        "train accuracy": [[0, 0.1, 0.2]] * 2,
        "test accuracy": [[0.5, 0.9, 0.8]] * 2,
        "bytes sent so far, both ways, all clients": [[2**21 * n for n in (1, 2, 3)], [786432 * n for n in (1, 2, 3)]],
    }
    # 6 Mibit are 0.75 MiB; a fifth is 0.15 MiB, and the nearest power of two is 1/8 MiB
    assert [text.get_text() for text in drawn[0].axes[-1].get_yticklabels()][1:4] == ["0 B", "128 KiB", "256 KiB"]
    header, _, float32, uint8 = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert (header[0], float32[0], uint8[0]) == ("encoder", "float32", "uint8")
    assert header[-2:] == ["broadcast, Mibit a round", "upload, Mibit a round"]
    assert (float32[-2:], uint8[-2:]) == (["1.00", "1.00"], ["0.25", "0.50"])
    assert imread(tmp_path / "figure.png").shape == (1200, 1650, 4)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["run.seed=3", "encoder=uint8", "dataset=writers", "dataset.path=x", "run.workers=1", "run.keep=2"], "uint8"),
        (["dataset.alpha=0.1", "encoder=uint8"], "uint8,dataset.alpha=0.1"),
        (["encoder=uint8", "encoder.bits=4"], "uint8,encoder.bits=4"),
    ],
)
def test_the_frontiers_schemes_are_what_changes_a_result(given: list[str], name: str) -> None:
    from experiments.frontier.figure import scheme

    assert scheme(given) == name


def frontier_run(folder: Path, overrides: Sequence[str], commit: str, **numbers: Any) -> Path:
    write_run(folder, overrides, git_commit=commit, **numbers)
    OmegaConf.save(OmegaConf.create(list(overrides)), folder / ".hydra/overrides.yaml")
    for number, share in enumerate((0.5, 0.25, 0.25)):
        spent = {"train": 1 - share, "encode": share, "decode": 0.0, "aggregate": 0.0}
        metric(number, **{f"seconds_of_{phase}": seconds for phase, seconds in spent.items()})(folder)
    return folder


def call_frontier(monkeypatch: pytest.MonkeyPatch, results: Path, *arguments: object) -> list[str]:
    from experiments.frontier import figure

    monkeypatch.setattr(figure, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["figure", *map(str, arguments), "--output", str(results.with_suffix(".png"))])
    figure.main()
    return results.read_text().splitlines()[1:]


REAL = ("dataset=emnist_digits", "encoder=uint8")
NO_RESULTS = "dataset,rounds,scheme,runs,down,up,accuracy,spread,encode,decode,commit\n"


def test_the_frontiers_rows_lose_no_seed_and_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        where = f"dataset.path={'/old' if seed < 3 else '/new'}"
        often = ["run.evaluate_every=3"] if seed == 5 else []
        given = [*REAL, f"run.seed={seed}", where, *often]
        frontier_run(tmp_path / f"runs/{seed}", given, f"{seed // 4}" * 40, accuracies=(0.5, None, 0.9 + seed / 100))
    (results := tmp_path / "results.csv").write_text(NO_RESULTS)
    (row,) = call_frontier(monkeypatch, results, tmp_path / "runs")
    assert row == "emnist_digits,3,uint8,6,9.1429,4.4138,92.5,1.87,25.0,0.0,0000000+1111111"
    assert call_frontier(monkeypatch, results) == [row]


def test_the_frontiers_rows_take_no_seed_twice_and_no_unlike_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = frontier_run(tmp_path / "a", REAL, "0" * 40)
    b = frontier_run(tmp_path / "b", [*REAL, "run.evaluate_every=3"], "0" * 40)
    monkeypatch.setitem(ENCODERS["uint8"], "threshold", 0)  # the default of another commit
    c = frontier_run(tmp_path / "c", [*REAL, "run.seed=1"], "1" * 40)
    (results := tmp_path / "results.csv").write_text(NO_RESULTS)
    for other, why in ((b, " with the same seed, 0"), (c, ", but differ in encoder.threshold")):
        with pytest.raises(SystemExit) as error:
            call_frontier(monkeypatch, results, a, other)
        pair = f"{a} and {other} would stand in one row (uint8 on emnist_digits)"
        assert error.value.code == f"fedq: {pair}{why}: give one of them"
    assert results.read_text() == NO_RESULTS


def test_the_frontiers_rows_lose_runs_only_if_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1, 2):
        frontier_run(tmp_path / f"runs/{seed}", [*REAL, f"run.seed={seed}"], "0" * 40)
    old = NO_RESULTS + "emnist_digits,3,uint8,5,9.1,4.4,81.0,0.1,,,1111111\n"
    (results := tmp_path / "results.csv").write_text(old)
    with pytest.raises(SystemExit) as error:
        call_frontier(monkeypatch, results, tmp_path / "runs")
    said = "uint8 on emnist_digits after 3 rounds has 5 runs in results.csv, not 3: give all seeds, or --fewer"
    assert error.value.code == f"fedq: {said}"
    assert results.read_text() == old
    (row,) = call_frontier(monkeypatch, results, tmp_path / "runs", "--fewer")
    assert row == "emnist_digits,3,uint8,3,9.1429,4.4138,80.0,0.0,25.0,0.0,0000000"
    assert call_frontier(monkeypatch, results, tmp_path / "runs") == [row]


# ---- the command line


def test_two_real_runs_compare(tmp_path: Path) -> None:
    few = ["model=mlp", "run.rounds=2", "dataset.clients=4", "run.clients_per_round=2"]
    for encoder in ("float32", "uint8"):
        fedq(tmp_path, f"encoder={encoder}", *few, f"hydra.run.dir={tmp_path}/{encoder}")
    command = [sys.executable, "-W", "error", "-m", "fedq.compare", tmp_path, "--output", tmp_path / "compare.png"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    header, _, float32, uint8 = (line.split() for line in done.stdout.splitlines()[:4])
    assert header[:2] == ["encoder", "runs"]
    assert (float32[0], uint8[0]) == ("float32", "uint8")
    by_encoder = {run.choices["encoder"]: run for run in read_runs([tmp_path])}
    for name, words in (("float32", float32), ("uint8", uint8)):
        run = by_encoder[name]
        assert f"{100 * run.summary['final_test_accuracy']:.2f}" == words[2]
        assert run.curve("cumulative_bits")[2] == run.summary["broadcasted_bits"] + run.summary["aggregated_bits"]
    ratios = [word for word in float32 + uint8 if word.endswith("×")]
    assert ratios[:2] == ["1.00×", "1.00×"]
    assert all(3.8 < float(ratio[:-1]) < 4 for ratio in ratios[2:])
    assert imread(tmp_path / "compare.png").shape[1] == 1650
