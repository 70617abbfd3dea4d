import dataclasses
import math
import os
import zipfile
from functools import partial

import pytest
import torch
from noise import RUN, Noise, make_process

from fedq.config import ConfigError
from fedq.encoding import Encoder, PowerSGD, StateDictEncoder
from fedq.errors import FedqError
from fedq.learning import FederatedAveraging, LocalTraining, ServerState
from fedq.models import MLP
from fedq.simulation import checkpoint
from fedq.simulation.checkpoint import CheckpointError
from fedq.simulation.loop import rounds
from fedq.simulation.saving import continued

CONFIG = {"run": {"seed": 3, "rounds": 5}, "client": {"lr": 0.1}}


def states_equal(a: ServerState, b: ServerState) -> bool:
    buffers = [s.optimizer["state"][0]["momentum_buffer"] for s in (a, b)]
    return (
        a.round == b.round
        and all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights | b.weights)
        and torch.equal(*buffers)
        and (a.broadcasted_bits, a.aggregated_bits) == (b.broadcasted_bits, b.aggregated_bits)
    )


def test_a_checkpoint_holds_all_there_is(tmp_path):
    process, dataset = make_process(), Noise()
    states = [state for state, _ in rounds(process, process.initialize(), dataset, RUN)]
    path = checkpoint.save(states[2], CONFIG, tmp_path / "checkpoints", 2)
    loaded, config = checkpoint.load(path)
    assert config == CONFIG
    assert states_equal(loaded, states[2])
    # a resumed run gives the same weights as a run without a stop
    *_, (last, _) = rounds(make_process(), loaded, dataset, RUN)
    assert states_equal(last, states[4])


def test_no_field_of_a_state_is_left_out(tmp_path):
    tensors = {"w": torch.arange(3.0)}
    values = {
        "weights": tensors,
        "optimizer": {"a": 1},
        "broadcast": {"w/0/a": torch.tensor(2)},
        "upload": {"w/1/a": torch.tensor(3)},
    }
    values |= {
        "residual": {"w": torch.ones(3)},
        "groups": {"*control/w": torch.full((3,), 4.0)},
        "received": {"w": torch.zeros(3)},
        "kept": (torch.tensor([5, 6], dtype=torch.uint8), torch.tensor([7], dtype=torch.uint8)),
        "last_received": {7: 8},
        "in_flight": {9: {"arrival": torch.tensor(10.5)}},
        "base": "ab12",
    }
    names = [field.name for field in dataclasses.fields(ServerState)]
    numbers = {name: 10 + i for i, name in enumerate(names) if name not in values}
    state = ServerState(**values, **numbers | {"norm": 0.5})
    loaded, _ = checkpoint.load(checkpoint.save(state, CONFIG, tmp_path, 1))
    for name in names:
        found, kept = getattr(loaded, name), getattr(state, name)
        assert repr(found) == repr(kept) != repr(getattr(ServerState(0, {}, {}, {}, {}), name)), name


def test_what_the_encoders_have_learnt_is_in_a_checkpoint(tmp_path):
    def learning() -> FederatedAveraging:
        chain = StateDictEncoder(Encoder([PowerSGD(2)]), 1000)
        return FederatedAveraging(
            partial(MLP, 10), LocalTraining(lr=0.1), partial(torch.optim.SGD, lr=1.0), chain, chain, seed=RUN.seed
        )

    process, dataset = learning(), Noise()
    states = [state for state, _ in rounds(process, process.initialize(), dataset, RUN)]
    loaded, _ = checkpoint.load(checkpoint.save(states[2], CONFIG, tmp_path, 2))
    for direction in ("broadcast", "upload"):
        start, kept, found = (getattr(s, direction) for s in (process.initialize(), states[2], loaded))
        assert kept.keys() == found.keys() == start.keys()
        assert len(kept) == 3  # the layers above the threshold
        for path, value in kept.items():
            assert value.dtype == found[path].dtype
            assert torch.equal(value, found[path])
            assert not torch.equal(value, start[path])
    *_, (last, _) = rounds(learning(), loaded, dataset, RUN)
    assert all(torch.equal(value, last.weights[name]) for name, value in states[4].weights.items())
    assert all(torch.equal(value, last.upload[path]) for path, value in states[4].upload.items())


def test_the_last_checkpoints_are_kept_and_no_half_written_one(tmp_path, monkeypatch):
    process = make_process()
    start = process.initialize()
    states = [state for state, _ in rounds(process, start, Noise(), RUN)]
    for state in states[:4]:
        checkpoint.save(state, CONFIG, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_000003.pt", "round_000004.pt"]

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(states[4], CONFIG, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["round_000003.pt", "round_000004.pt"]


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"round": Evil()}, tmp_path / "round_000001.pt")
    with pytest.raises(CheckpointError, match=r"round_000001.pt cannot be used: .*[Ww]eights.only"):
        checkpoint.load(tmp_path / "round_000001.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        *({"round": wrong} for wrong in ("3", -1, True, 1.0, 2**40)),
        *({"weights": wrong} for wrong in ([1], {"w": 1}, {1: torch.ones(2)}, {"w": torch.eye(2).to_sparse()})),
        *({"upload": wrong} for wrong in (5, {"w": {"0": {}}}, {"w": 1}, {1: torch.ones(2)})),
        *({"last_received": wrong} for wrong in ([], {"7": 8}, {7: -8})),
        *({"norm": wrong} for wrong in (None, math.nan, math.inf, -1.0)),
        {"optimizer": 5},
        {"kept": (5, "6")},
        {"repeats": 2**32},
        {"config": 7},
    ],
    ids=str,
)
def test_what_is_of_another_type_is_not_a_checkpoint(change, tmp_path):
    whole = {field.name: getattr(some_states()[0], field.name) for field in dataclasses.fields(ServerState)} | {
        "config": CONFIG
    }
    torch.save(whole, tmp_path / "round_000001.pt")
    assert checkpoint.load(tmp_path / "round_000001.pt")[1] == CONFIG
    torch.save(whole | change, tmp_path / "round_000001.pt")
    with pytest.raises(CheckpointError, match=r"round_000001.pt cannot be used: (it is not a|Validating sparse)"):
        checkpoint.load(tmp_path / "round_000001.pt")


def test_a_checkpoint_of_an_earlier_version_is_resumed_or_refused_in_a_sentence(tmp_path):
    """Checkpoints of commit 1c20104 hold adaptive state by tensor and place, and only the lengths of broadcasts."""
    after = some_states()[0]
    plain = {name: getattr(after, name) for name in ("round", "weights", "optimizer", "broadcasted_bits", "norm")}
    nested = {"broadcast": {"w": {0: {"a": torch.ones(2)}}, "v.w": {}}, "upload": {"w": {1: {"b": torch.zeros(1)}}}}
    old = plain | nested | {"residual": {}, "received": {}, "lengths": (), "holders": {}, "config": CONFIG}
    (tmp_path / "checkpoints").mkdir()
    torch.save(old, tmp_path / "round_000001.pt")
    loaded, _ = checkpoint.load(tmp_path / "round_000001.pt")
    assert {path: value.tolist() for path, value in loaded.broadcast.items()} == {"w/0/a": [1, 1]}
    assert {path: value.tolist() for path, value in loaded.upload.items()} == {"w/1/b": [0]}
    assert torch.equal(loaded.weights["w"], after.weights["w"]) and loaded.reported_bits == 0
    torch.save(old | {"round": 0}, tmp_path / "checkpoints" / "round_000000.pt")
    torch.save(old | {"lengths": (5, 6), "holders": {7: 8}}, tmp_path / "checkpoints" / "round_000001.pt")
    # the first file could be resumed, but the rounds since would be lost without a word
    with pytest.raises(FedqError, match=r"round_000001.pt cannot be used: .* without the broadcasts that reference"):
        checkpoint.resume("auto", tmp_path, CONFIG)


def some_states() -> list[ServerState]:
    """Returns the states after each of five rounds of a tiny model, whose files are quick to read and write."""
    w, n = torch.arange(30.0), range(1, 6)
    return [ServerState(i, {"w": i * w}, {"state": {0: {"momentum_buffer": w - i}}}, {}, {}, 10 * i, i) for i in n]


def test_a_state_of_another_optimizer_is_refused(tmp_path):
    process = make_process()
    *_, (state, _) = rounds(process, process.initialize(), Noise(), dataclasses.replace(RUN, rounds=2))
    continued(process, state, tmp_path)
    short = {"momentum_buffer": torch.ones(3)}
    for forged in (
        {"a": 1},
        {"state": {}, "param_groups": []},
        state.optimizer | {"state": 5},
        state.optimizer | {"state": state.optimizer["state"] | {0: short}},
    ):
        sentence = f"{tmp_path}: its checkpoint holds another state of the server optimizer: "
        with pytest.raises(ConfigError, match=sentence):
            continued(process, dataclasses.replace(state, optimizer=forged), tmp_path)


def test_any_damage_to_a_checkpoint_is_found_or_harmless(tmp_path):
    state = some_states()[0]
    path = checkpoint.save(state, CONFIG, tmp_path, 2)
    whole = path.read_bytes()
    refused = 0
    for i in range(300):
        damaged = bytearray(whole)
        damaged[i * len(whole) // 300] ^= 1 << (i % 8)
        path.write_bytes(damaged)
        try:
            loaded, config = checkpoint.load(path)
        except CheckpointError as error:
            refused += str(path) in str(error)
        else:
            assert states_equal(loaded, state)
            assert config == CONFIG
    assert refused > 180  # many bytes of so small a file are dates and other bytes without effect
    entry = 0
    while (entry := whole.find(b"PK\x01\x02", entry + 1)) > 0:
        damaged = bytearray(whole)
        damaged[entry + 38] ^= 16  # the entry becomes a folder, and torch would not fill the tensor's memory
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is marked as a folder"):
            checkpoint.load(path)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog):
    states = some_states()
    folder = tmp_path / "checkpoints"
    for state in states[:3]:
        newest = checkpoint.save(state, CONFIG, folder, 3)
    newest.write_bytes(newest.read_bytes()[:-100])
    state, its_folder = checkpoint.resume("auto", tmp_path, CONFIG)
    assert (state.round, its_folder) == (2, tmp_path)
    assert str(newest) in caplog.text
    assert checkpoint.attempts(folder) == [2, 1]
    # the resumed run deletes the damaged checkpoint, but not the one that it resumed from
    (folder / f"round_000099.pt.{'0a' * 16}.tmp").write_bytes(b"half a checkpoint")
    checkpoint.save(states[1], CONFIG, folder, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["round_000001.pt", "round_000002.pt"]
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoint.resume("auto", tmp_path, CONFIG)


def test_where_to_go_on_from(tmp_path):
    states = some_states()
    assert checkpoint.resume("auto", tmp_path, CONFIG) is None
    for state in states[:2]:
        checkpoint.save(state, CONFIG, tmp_path / "run" / "checkpoints", 2)
    assert checkpoint.resume("never", tmp_path / "run", CONFIG) is None
    for where in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "round_000002.pt"):
        state, its_folder = checkpoint.resume(str(where), tmp_path / "new", CONFIG)
        assert (state.round, its_folder) == (2, tmp_path / "run")
    state, _ = checkpoint.resume(str(tmp_path / "run" / "checkpoints" / "round_000001.pt"), tmp_path / "new", CONFIG)
    assert state.round == 1
    with pytest.raises(CheckpointError, match="no usable checkpoint in .*nowhere"):
        checkpoint.resume(str(tmp_path / "nowhere"), tmp_path / "new", CONFIG)


def test_another_runs_checkpoint_is_refused_and_a_longer_run_is_not_another(tmp_path):
    checkpoint.save(some_states()[0], CONFIG, tmp_path / "checkpoints", 2)
    longer = {"run": {"seed": 3, "rounds": 50}, "client": {"lr": 0.1}}
    assert checkpoint.resume("auto", tmp_path, longer) is not None
    other = {"run": {"seed": 3, "rounds": 5}, "client": {"lr": 0.2}}
    with pytest.raises(CheckpointError, match=r"is of another run: client.lr was 0.1, not 0.2; set hydra.run.dir"):
        checkpoint.resume("auto", tmp_path, other)


@pytest.mark.parametrize("content", [torch.zeros(3), {"weight": torch.zeros(3)}, [1, 2]])
def test_a_file_of_other_things_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="weights.pt cannot be used: it is not a checkpoint of fedq"):
        checkpoint.load(tmp_path / "weights.pt")


def test_the_same_command_again_goes_on_in_its_own_folder_and_one_may_go_back(tmp_path):
    first, later = (dataclasses.replace(some_states()[0], round=number) for number in (1, 2))
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    path = checkpoint.save(first, CONFIG, theirs / "checkpoints", 2)
    assert checkpoint.resume(str(theirs), mine, CONFIG)[0].round == 1
    own = [checkpoint.save(state, CONFIG, mine / "checkpoints", 2) for state in (first, later)]
    for where in (path, theirs):
        assert checkpoint.resume(str(where), mine, CONFIG)[0].round == 2
    assert checkpoint.resume(str(own[0]), mine, CONFIG)[0].round == 1


def test_an_archive_whose_directory_is_damaged_is_named(tmp_path):
    """For such a file zipfile and torch raise many classes of errors, also EOFError and zlib.error."""
    path = checkpoint.save(some_states()[0], CONFIG, tmp_path, 2)
    whole, found = path.read_bytes(), set()
    with zipfile.ZipFile(path) as archive:
        entries = [archive.start_dir, *(info.header_offset for info in archive.infolist())]
    for start in entries:
        for place in range(start, min(start + 46, len(whole))):  # a directory entry; file headers are shorter
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << 3]) + whole[place + 1 :])
            try:
                checkpoint.load(path)
            except CheckpointError as error:
                told = str(error).startswith(f"checkpoint {path} cannot be used: ")
                found.add(type(error.__cause__).__name__ if told else str(error))
    assert {"EOFError", "error", "BadZipFile"} <= found and all(name.isidentifier() for name in found)


def test_what_else_lies_among_checkpoints_is_left_alone(tmp_path):
    path = checkpoint.save(some_states()[0], CONFIG, tmp_path / "checkpoints", 1)
    kept = path.with_name("round_best.pt")
    kept.write_bytes(path.read_bytes())
    checkpoint.save(some_states()[1], CONFIG, tmp_path / "checkpoints", 1)
    assert kept.exists() and not path.exists()
    assert checkpoint.resume("auto", tmp_path, CONFIG)[0].round == some_states()[1].round


def test_how_many_clients_are_enough_may_change_for_rounds_to_come_alone(tmp_path):
    state = some_states()[0]
    config, other = ({"run": {"rounds": state.round, "min_clients": n}} for n in (1, 3))
    checkpoint.save(state, config, tmp_path / "checkpoints", 1)
    longer = {"run": other["run"] | {"rounds": state.round + 1}}
    assert checkpoint.resume("auto", tmp_path, longer)[0].round == state.round
    with pytest.raises(CheckpointError, match="run.min_clients was 1, not 3"):
        checkpoint.resume("auto", tmp_path, other)
