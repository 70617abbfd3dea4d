"""The tutorial's notebook runs from start to end, and today's code gives its stored outputs."""

import json
import re
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "tutorial" / "tutorial.ipynb"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@pytest.fixture
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """Returns the kinds of the outputs: the name of a stream, or the formats of a displayed object.

    A stream may come in several parts; they count as one.
    """
    each = [output.get("name") or (output.output_type, *sorted(output.get("data", ()))) for output in cell.outputs]
    return [kind for kind, _ in groupby(each)]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def check_printed(stored, executed, exact):
    """Checks that both texts have the same words and numbers, or nearly the same where training decides a number.

    Losses, accuracies and errors are printed with three decimals or more. These numbers and entropy-coded sizes differ
    a little between kinds of processors. All other numbers are equal everywhere.
    """
    assert re.sub(r"[#\s]+", " ", NUMBER.sub("#", executed)) == re.sub(r"[#\s]+", " ", NUMBER.sub("#", stored))
    for before, after in zip(NUMBER.findall(stored), NUMBER.findall(executed), strict=True):
        if len(before.partition(".")[2]) >= 3:
            assert float(after) == pytest.approx(float(before), abs=0.05)
        elif exact:
            assert after == before
        else:
            assert float(after) == pytest.approx(float(before), rel=0.01)


def test_the_stored_notebook_opens_everywhere(stored):
    nbformat.validate(stored)
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert stored.metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in code_cells(stored)] == list(range(1, len(code_cells(stored)) + 1))
    shown = {kind for cell in code_cells(stored) for kind in kinds(cell)}
    assert shown == {"stdout", ("display_data", "image/png", "text/plain")}
    for output in (output for cell in code_cells(stored) for output in cell.outputs if "data" in output):
        del output.data["image/png"]
    assert not re.search(r"""[\s"'](?:/[\w.-]+){2,}""", json.dumps(stored)), "an absolute path"


def test_the_notebook_runs_from_start_to_end(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(fresh):
        cell.outputs = []
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(fresh, timeout=120, kernel_name="python3", resources=where).execute()
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert kinds(after) == kinds(before), before.source
        check_printed(printed(before), printed(after), exact="entropy-coded" not in before.metadata.get("tags", ()))
    assert [path.name for path in tmp_path.iterdir()] == ["ipython"]
