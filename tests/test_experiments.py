"""The experiments: tables cut no cell, commands start, and links in documents lead to files."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table

from experiments.tables import show

FOLDER = Path(__file__).parents[1] / "experiments"
NAMES = ["drive: 8 bits down, a rotation and 1 bit up", "float32", "float32 in bf16", "matrix products"]
HEADERS = ["", "seconds", "of the peak", "to bare", "to float32", "train", "encode", "decode", "aggregate"]
# these files run in other environments
ELSEWHERE = {*(f"peers/{name}.py" for name in ("blazefl", "flower", "pfl", "own", "contestant")), "nncodec/hostile.py"}
ELSEWHERE |= {f"flower/{name}.py" for name in ("nodes", "fuzz", "link", "deployment", "secure", "plain")}
COMMANDS = [path for path in sorted(FOLDER.glob("*/*.py")) if str(path.relative_to(FOLDER)) not in ELSEWHERE]


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_no_name_and_no_number_of_a_table_is_cut(
    columns: int, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    table = Table(*HEADERS)
    for i, name in enumerate(NAMES):
        table.add_row(name, *(f"{i + 1}.0{n}" for n in range(1, 6)), *(f"{100 * n + i} ms" for n in range(6, 9)))
    show(table)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    words = printed.split()
    for word in " ".join([*HEADERS, *NAMES]).split():
        assert word in words
    for i in range(len(NAMES)):
        assert all(f"{i + 1}.0{n}" in words for n in range(1, 6)) and all(str(100 * n + i) in words for n in (6, 7, 8))
    if terminal and columns >= 80:
        assert max(map(len, printed.splitlines())) <= columns
    if not terminal:
        assert all(name in printed for name in NAMES)  # a row takes one line


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_command_says_what_it_does(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"experiments.{path.parent.name}.{path.stem}").main()
    assert f"usage: {path.name}" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.md")), ids=lambda path: path.parent.name)
def test_links_and_commands_of_documents_exist(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    for module in re.findall(r"python -m (experiments[.\w]*)", text):
        assert (FOLDER.parent / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_the_index_has_every_question() -> None:
    index = (FOLDER / "README.md").read_text()
    for readme in FOLDER.glob("*/README.md"):
        question = readme.read_text().splitlines()[0].removeprefix("# ")
        assert f"| [{question}]({readme.parent.name}/README.md) |" in index
