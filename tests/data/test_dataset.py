"""Clients of any dataset: integers of any library become ints, and other values are refused."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import fedq

from fedq.data import Client, Examples
from fedq.errors import FedqError


def load() -> Examples:
    return Examples(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


def test_what_reads_examples_must_be_a_function() -> None:
    with pytest.raises(FedqError, match="a client's load must be a function that returns Examples, .* not a Examples"):
        Client(0, load())  # type: ignore[arg-type]
    with pytest.raises(FedqError, match="a client's test must be a function"):
        Client(0, load, test=load())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8, np.uint64, np.array, torch.tensor])
def test_integers_of_any_library_become_ints(kind: Any) -> None:
    client = Client(kind(7), load, kind(3))
    assert (client.number, client.examples) == (7, 3)
    assert type(client.number) is type(client.examples) is int


def test_a_bool_becomes_an_int() -> None:
    assert type(Client(True, load).number) is int


@pytest.mark.parametrize("wrong", [np.float64(3.0), np.bool_(True), 3.0, "3", None, np.array([1, 2])])
@pytest.mark.parametrize("field", ["number", "examples"])
def test_other_values_are_refused_in_one_sentence(field: str, wrong: Any) -> None:
    arguments: dict[str, Any] = {"number": 0, "examples": 0, field: wrong}
    with pytest.raises(FedqError, match=re.escape(f"a client's {field} must be an integer, not {wrong!r}.")):
        Client(load=load, **arguments)


@pytest.mark.parametrize(("field", "most"), [("number", 2**64 - 2), ("examples", 2**63 - 1)])
def test_numbers_that_no_message_or_checkpoint_can_hold_are_refused(field: str, most: int) -> None:
    arguments: dict[str, Any] = {"number": 0, "examples": 0}
    assert getattr(Client(load=load, **arguments | {field: most}), field) == most
    for wrong in (-1, most + 1):
        with pytest.raises(FedqError, match=f"a client's {field} must be from 0 to {most}, not {wrong}."):
            Client(load=load, **arguments | {field: wrong})


def test_a_client_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Client(np.int64(3), load))) == Client(3, load)


MINE = """
from dataclasses import replace

import numpy as np

from fedq.data.mnist5k import Mnist5k


class Mine(Mnist5k):
    def __init__(self, kind, field="", **arguments):
        super().__init__(**arguments)
        self.kind = getattr(np, kind)
        if field:
            setattr(self, field, self.kind(getattr(self, field)))

    def client(self, number):
        client = super().client(number)
        return replace(client, number=np.int64(number), examples=np.int64(client.examples))
"""
RUN = ("dataset._target_=mine.Mine", "model=mlp", "run.clients_per_round=3", "run.checkpoint_every=1")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("keeps", ["+encoder.broadcast.reference=last", "encoder.upload.error_feedback=true"])
def test_a_run_resumes_whose_dataset_numbers_clients_with_numpy(mine: Path, keeps: str) -> None:
    for rounds in (1, 2):
        options = (f"run.rounds={rounds}", "hydra.run.dir=run", "+dataset.kind=int64", "+dataset.field=num_classes")
        done = fedq(mine, *RUN, *options, "encoder=sign", keeps)
    assert "resum" in done.stdout + done.stderr


@pytest.mark.parametrize("field", ["num_classes", "num_clients"])
@pytest.mark.parametrize("kind", ["float64", "bool_"])
def test_a_datasets_number_that_is_no_integer_is_refused_in_one_sentence(mine: Path, field: str, kind: str) -> None:
    done = fedq(mine, *RUN, f"+dataset.kind={kind}", f"+dataset.field={field}", code=1)
    assert f"dataset.{field} must be an integer, not " in done.stderr and "Traceback" not in done.stderr


class WithoutClients:
    """Returns examples in place of a client."""

    num_classes, num_clients = 2, 3

    def client(self, number: int) -> Examples:
        return load()

    def test(self) -> Examples:
        return load()


def test_a_dataset_that_gives_examples_as_a_client_is_refused_in_one_sentence(tmp_path: Path) -> None:
    mine = "~dataset", "+dataset={_target_:data.test_dataset.WithoutClients}", "run.clients_per_round=3"
    sentence = "client(0) of WithoutClients must return a fedq.data.Client, such as Client(0, lambda: examples)"
    assert sentence in fedq(tmp_path, *mine, "model=mlp", code=1).stderr
