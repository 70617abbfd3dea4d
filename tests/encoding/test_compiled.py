"""Compiled loops: a stale cache never changes results, and a machine without a cache folder works."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedq

LOOPS = sorted(Path(fedq.__file__).parent.rglob("*_loops.py"))
CLASSES = """
import numpy as np
from fedq.encoding.stages.trellis_loops import trellis_classes
classes = np.zeros((2, 3), np.uint8)
print(trellis_classes(np.array([[0, 1, 70], [5, 0, 0]], np.int32), classes).tolist(), classes.tolist())
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Returns a copy of fedq without caches, and without imports in the packages: torch takes seconds to load."""
    shutil.copytree(Path(fedq.__file__).parent, tmp_path / "fedq", ignore=shutil.ignore_patterns("__pycache__"))
    for package in tmp_path.rglob("__init__.py"):
        package.write_text("")
    return tmp_path


def run(folder: Path, **environment: str) -> str:
    """Returns the output of the program, run with the copy of fedq in `folder`."""
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    process = subprocess.run(
        [sys.executable, "-c", CLASSES],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
    )
    assert not process.returncode, process.stderr
    return process.stdout


def caches(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nb[ic]"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("2 * (1023 - 16), 0)", "2 * (1023 - 17), 0)"),  # in a function of another file, whose length stays the same
        ("CLASSES, BINS = 64, 16", "CLASSES, BINS = 32, 16"),  # in a constant of another file
    ],
)
def test_a_loop_is_compiled_anew_where_another_file_changes(own: Path, before: str, after: str) -> None:
    first, kept = run(own), caches(own)
    assert kept
    assert run(own) == first
    assert caches(own) == kept, "an unchanged loop is compiled twice"
    path = own / "fedq" / "encoding" / "coders" / "cabac_loops.py"
    text, times = path.read_text(), path.stat()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for compiled in own.rglob("*.pyc"):  # Python also compares times and sizes
        compiled.unlink()
    changed = run(own)
    for cache in caches(own):
        cache.unlink()
    assert run(own) == changed != first


def test_loops_work_without_a_place_for_the_cache(own: Path) -> None:
    expected = run(own)
    for folder in [path for path in own.rglob("*") if path.is_dir() and path.name == "__pycache__"]:
        shutil.rmtree(folder)
    for package in {path.parent for path in own.rglob("*.py")}:
        (package / "__pycache__").touch()  # a file: nobody can make a folder of this name
    nowhere = {"HOME": os.devnull, "XDG_CACHE_HOME": f"{os.devnull}/cache", "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(own, **nowhere) == expected
    assert not caches(own)


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_loops_import_nothing_that_their_cache_does_not_follow(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module == "fedq.encoding.compiled" or str(node.module).endswith("_loops")
        elif isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"math", "numpy"}


def test_only_one_file_asks_for_numba() -> None:
    files = [path for path in Path(fedq.__file__).parent.rglob("*.py") if "import numba" in path.read_text()]
    files += [path for path in Path(fedq.__file__).parent.rglob("*.py") if "from numba" in path.read_text()]
    assert [path.name for path in files] == ["compiled.py"]
