"""Imports go one way: train, integrations → simulation → learning → encoding. data, models and tracking know none."""

import ast
from pathlib import Path

import pytest

import fedq

ROOT = Path(fedq.__file__).parent
EVERYWHERE = {"errors", "files", "keys", "pretrained"}
KNOWS = {
    "encoding": set(),
    "data": set(),
    "models": set(),
    "tracking": set(),
    "learning": {"encoding", "data"},
    "simulation": {
        "learning",
        "encoding",
        "data",
        "tracking",
        "config",
        "config_nodes",
        "config_check",
        "config_differences",
    },
    "integrations": {"simulation", "learning", "encoding", "data", "tracking", "config"},
}


def imported(path: Path) -> set[str]:
    """Returns the parts of fedq that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports would not be seen here"
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names if node.module == "fedq")]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        names |= {name.split(".")[1] for name in modules if name.startswith("fedq.")}
    return names


@pytest.mark.parametrize("part", KNOWS)
def test_imports_go_one_way(part):
    # a __main__.py is a command line, as train.py
    files = sorted(path for path in (ROOT / part).rglob("*.py") if path.name != "__main__.py")
    assert len(files) > 1
    for path in files:
        assert imported(path) <= KNOWS[part] | EVERYWHERE | {part}, path


def test_every_part_is_looked_at():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == KNOWS.keys()
