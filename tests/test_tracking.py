"""The output of a run: the table of the summary, the progress bar at every width, text in any locale."""

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedq.tracking.console import ConsoleProgress
from fedq.tracking.summary import Summary

CONFIG = {"run": {"seed": 3, "clients_per_round": 10}}
MIB = 8 * 2**20
METRICS = {
    "round": 11,
    "train/loss": 0.3524,
    "train/accuracy": 0.891,
    "test/accuracy": 0.934,
    "broadcast_bits": 20 * MIB,
    "aggregated_bits": 5 * MIB,
    "cumulative_broadcasted_bits": 1000 * MIB,
    "cumulative_aggregated_bits": 1001 * MIB,
    "clients": 10,
    "uploads": 10,
    "repeats": 0,
    "seconds": 2.0,
}


def written(summary: Summary, **more: float) -> Summary:
    summary.start(CONFIG, 40 * MIB)
    summary.write(METRICS | {"cumulative_broadcasted_bits": 20 * MIB, "cumulative_aggregated_bits": 5 * MIB} | more)
    return summary


def test_the_table_has_bytes_a_client_a_round_and_takes_the_width_it_needs(tmp_path, capsys):
    folder = tmp_path / "a folder whose name is so long that no terminal would show it in one line of a table"
    folder.mkdir()
    written(Summary(folder)).print()
    lines = capsys.readouterr().out.splitlines()
    (down,) = (line for line in lines if "bytes down" in line)
    (up,) = (line for line in lines if "bytes up" in line)
    (each,) = (line for line in lines if "bytes a client a round" in line)
    assert "20.00 MiB, 20.00 x less than uncompressed" in down
    assert "5.00 MiB, 80.00 x less than uncompressed" in up
    assert "2.00 MiB down, 512.00 KiB up" in each
    assert max(map(len, lines[:-3])) <= 80
    assert not any("reports" in line for line in lines)
    assert lines[-3:] == [
        f"output: {folder}",
        f"curves: tensorboard --logdir '{folder}'",
        f"model: python -m fedq.export '{folder}' --to model",
    ]


def test_reports_are_counted_apart_and_unknown_metrics_ignored(tmp_path, capsys):
    more = {"report_bits": 80.0, "cumulative_reported_bits": 8 * 1234.0, "a/new/metric": 1.0}
    summary = written(Summary(tmp_path), **more)
    summary.print()
    assert summary.values["reported_bits"] == 8 * 1234
    assert re.search(r"bytes of reports\W+1.21 KiB", capsys.readouterr().out)


def test_a_summary_that_cannot_be_written_hides_no_other_error(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt), Summary(folder):  # there is no such folder
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="folder/summary.json"), Summary(folder):
        pass


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_bar_cuts_no_number(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = ConsoleProgress(1000, done=998)
    progress.write(METRICS)
    bar = progress._progress.get_renderable()
    progress.close()
    console = Console(width=width, file=StringIO(), record=True)
    console.print(bar)
    lines = console.export_text().rstrip().splitlines()
    assert len(lines) == (1 if width >= 120 else 2)
    for text in (
        "round 999/1000",
        "train loss 0.352, train acc 0.891, test acc 0.934",
        "1000.00 MiB down, 1001.00 MiB up",
    ):
        assert any(text in line for line in lines), lines
    assert max(map(len, lines)) <= width


def test_a_locale_without_a_character_ends_nothing():
    code = "from fedq.tracking.console import stdout_console as c; c().print('3.95\\xd7')"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, check=True)
    assert done.stdout == b"3.95?\n"
