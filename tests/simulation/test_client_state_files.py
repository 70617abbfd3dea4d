import functools
import gc
import os
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fedq.encoding import schema_of
from fedq.simulation.client_state_files import ClientStateError, ClientStateFiles

ELEMENTS = 256
SIZE = 4 * ELEMENTS
SCHEMA = schema_of({"w": torch.zeros(ELEMENTS)})


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@functools.cache
def drawn(client: int, serial: int) -> torch.Tensor:
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1000 * client + serial))


def residual(client: int, serial: int) -> dict[str, torch.Tensor]:
    return {"w": drawn(client, serial).clone()}


def store(folder: Path, memory: int = 2**30, shared: bool = False, serial: int = 0) -> ClientStateFiles:
    made = ClientStateFiles(folder, 7, memory, shared)
    made.resume(serial, folder if serial else None)
    return made


def version(store: ClientStateFiles, client: int, serial: int) -> int | None:
    """Returns the round that wrote the state in the store."""
    found = store.load(client, serial, SCHEMA)
    (which,) = [s for s in range(serial) if found and torch.equal(found["w"], drawn(client, s))] or [None]
    return which


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.residual"))


def test_the_newest_before_a_round_is_what_it_gets(tmp_path):
    for memory in (2**30, 0):
        kept = store(tmp_path / str(memory), memory)
        assert kept.load(3, 5, SCHEMA) == {}
        for serial in (2, 4, 7):
            kept.commit(3, serial, residual(3, serial))
        assert [version(kept, 3, serial) for serial in (2, 3, 4, 5, 7, 8)] == [None, 2, 2, 4, 4, 7]
        assert kept.load(4, 8, SCHEMA) == {}


@pytest.mark.parametrize("memory", [0, SIZE, 2**30])
def test_a_round_that_is_run_again_starts_from_what_was_before_it(tmp_path, memory):
    kept = store(tmp_path, memory)
    for serial in (0, 1, 2):
        kept.begin(serial)
        for client in (1, 2):
            kept.commit(client, serial, residual(client, serial))
    kept.begin(2)
    assert [version(kept, client, 9) for client in (1, 2)] == [1, 1]
    kept.commit(2, 2, residual(2, 2))  # without the other client
    kept.begin(3)
    assert [version(kept, client, 3) for client in (1, 2)] == [1, 2]
    kept.begin(0)
    assert kept.load(1, 9, SCHEMA) == kept.load(2, 9, SCHEMA) == {}


def test_any_floating_tensor_comes_back_exact(tmp_path):
    tensors = {
        "a": torch.randn(3, 4, 5).permute(2, 0, 1).to(torch.float16),
        "b.c": torch.randn(7).to(torch.bfloat16),
        "d": torch.randn((), dtype=torch.float64),
        "e": torch.zeros(0, 3),
        "f": torch.tensor([0.0, -0.0, 1e-45, 3e38]),
    }
    kept = store(tmp_path, 0)
    kept.commit(2**40, 12, tensors)
    back = kept.load(2**40, 13, schema_of(tensors))
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert back[name].numpy(force=True).tobytes() == value.contiguous().numpy().tobytes() if name != "b.c" else True
        assert torch.equal(back[name], value)


@pytest.mark.parametrize("memory", [0, SIZE - 1, SIZE, 5 * SIZE + 1])
def test_memory_is_bounded_and_nothing_is_lost(tmp_path, memory):
    kept, alive = store(tmp_path, memory), []
    most = 0
    for serial in range(6):
        for client in range(20):
            tensors = residual(client, serial)
            alive.append(weakref.ref(tensors["w"]))
            kept.commit(client, serial, tensors)
            del tensors
            most = max(most, SIZE * sum(ref() is not None for ref in alive))
            if client % 3:
                assert version(kept, client, serial + 1) == serial
    gc.collect()
    assert most <= memory
    assert most >= memory // SIZE * SIZE  # the memory is used
    assert [version(kept, client, 6) for client in range(20)] == [5] * 20


def test_the_least_recently_used_goes_to_a_file_first(tmp_path):
    kept = store(tmp_path, 3 * SIZE)
    for client in (1, 2, 3):
        kept.commit(client, 0, residual(client, 0))
    assert files(tmp_path) == []
    assert version(kept, 1, 1) == 0
    kept.commit(4, 0, residual(4, 0))
    assert files(tmp_path) == ["2_0.residual"]
    kept.commit(5, 0, residual(5, 0))
    assert files(tmp_path) == ["2_0.residual", "3_0.residual"]
    assert [version(kept, client, 1) for client in range(1, 6)] == [0] * 5


def test_what_no_checkpoint_can_ask_for_is_never_written(tmp_path):
    kept = store(tmp_path)
    for serial in range(10):
        kept.commit(1, serial, residual(1, serial))
        kept.settle()
    kept.commit(1, 10, residual(1, 10))  # this round is not over: a run that stops here resumes before this round
    kept.flush()
    assert files(tmp_path) == ["1_10.residual", "1_9.residual"]
    again = store(tmp_path, serial=10)
    assert version(again, 1, 10) == 9
    again.prune([10])
    assert files(tmp_path) == ["1_9.residual"]


def test_only_what_a_checkpoint_can_ask_for_stays(tmp_path):
    kept = store(tmp_path, 0)
    for serial in (0, 3, 5, 6, 8):
        kept.commit(1, serial, residual(1, serial))
    kept.commit(2, 0, residual(2, 0))
    kept.commit(3, 9, residual(3, 9))
    kept.prune([4, 9])
    assert files(tmp_path) == ["1_3.residual", "1_8.residual", "2_0.residual"]
    assert version(kept, 1, 9) == 8
    assert kept.load(3, 10, SCHEMA) == {}


def test_the_same_run_killed_and_resumed_at_random_gets_the_same(tmp_path):
    """Compares with a dict of all states, for random cohorts, memories, checkpoints and stops."""
    for seed in range(40):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        memory = draw.choice([0, 2 * SIZE, 7 * SIZE, 2**30])
        truth: dict[int, list[int]] = {}
        kept, serial, checkpoints = store(folder, memory), 0, [0]
        for _ in range(60):
            if draw.random() < 0.15:  # the run is killed and resumes from a checkpoint
                serial = draw.choice(checkpoints)
                kept = store(folder, draw.choice([0, memory]), serial=serial)
                checkpoints = [c for c in checkpoints if c <= serial]
                kept.prune(checkpoints)
                truth = {client: [v for v in versions if v < serial] for client, versions in truth.items()}
            kept.begin(serial)
            cohort = draw.sample(range(12), 4)
            for client in cohort[: draw.choice([2, 4])]:  # a round may stop early
                expected = max(truth.get(client, []), default=None)
                assert version(kept, client, serial) == expected, (seed, serial)
                kept.commit(client, serial, residual(client, serial))
                truth.setdefault(client, []).append(serial)
            serial += 1
            if draw.random() < 0.8:  # otherwise the round is repeated, and no checkpoint is written here
                kept.settle()
                if draw.random() < 0.3:
                    kept.flush()
                    checkpoints = [*checkpoints, serial][-2:]
                    kept.prune(checkpoints)
                    assert len(files(folder)) <= 2 * 12


def test_later_rounds_are_ignored_and_removed(tmp_path):
    kept = store(tmp_path, 0)
    for serial in (1, 4, 6):
        kept.commit(1, serial, residual(1, serial))
    (tmp_path / "2_3.tmp").write_bytes(b"half of one")
    again = store(tmp_path, 0, serial=4)
    assert version(again, 1, 7) == 1
    again.prune([4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_1.residual"]
    fresh = store(tmp_path)
    assert fresh.load(1, 9, SCHEMA) == {}


def test_another_folder_is_gone_on_from_and_left_as_it_is(tmp_path):
    first = store(tmp_path / "first", 0)
    for serial in (1, 4, 6):
        first.commit(1, serial, residual(1, serial))
    second = ClientStateFiles(tmp_path / "second", 7)
    second.resume(6, tmp_path / "first")
    assert files(tmp_path / "second") == ["1_4.residual"]
    second.prune([6])
    assert version(second, 1, 6) == 4
    assert len(files(tmp_path / "first")) == 3
    with pytest.raises(ClientStateError, match="nowhere is missing"):
        ClientStateFiles(tmp_path / "third", 7).resume(6, tmp_path / "nowhere")


def test_any_damage_to_a_file_is_refused_by_name(tmp_path):
    store(tmp_path, 0).commit(1, 0, residual(1, 0))
    path = tmp_path / "1_0.residual"
    whole = path.read_bytes()
    for i in range(0, 8 * len(whole), 61):
        damaged = bytearray(whole)
        damaged[i // 8] ^= 1 << (i % 8)
        path.write_bytes(damaged)
        with pytest.raises(ClientStateError, match=r"1_0.residual cannot be used"):
            store(tmp_path, serial=1).load(1, 1, SCHEMA)
    for content in (b"", whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(ClientStateError, match=r"1_0.residual cannot be used"):
            store(tmp_path, serial=1).load(1, 1, SCHEMA)
    path.write_bytes(whole)
    path.rename(tmp_path / "2_0.residual")
    with pytest.raises(ClientStateError, match=r"2_0.residual cannot be used: .*client 1"):
        store(tmp_path, serial=1).load(2, 1, SCHEMA)
    kept = store(tmp_path, serial=1)
    (tmp_path / "2_0.residual").unlink()
    with pytest.raises(ClientStateError, match=r"2_0.residual cannot be used: .*No such file"):
        kept.load(2, 1, SCHEMA)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    kept = store(tmp_path, 0)
    kept.commit(1, 0, residual(1, 0))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        kept.commit(1, 1, residual(1, 1))
    assert files(tmp_path) == ["1_0.residual"]
    with pytest.raises(ClientStateError, match=r"1_1.residual cannot be written: .*No space"):
        store(tmp_path, shared=True).commit(1, 1, residual(1, 1))


@pytest.mark.parametrize("shared", [False, True])
def test_threads_do_not_disturb_each_other(tmp_path, shared):
    kept = store(tmp_path, 3 * SIZE, shared)
    barrier = threading.Barrier(8)

    def one(client: int, serial: int) -> bool:
        if client < 8:
            barrier.wait()
        expected = serial - 1 if serial else None
        found = version(kept, client, serial)
        kept.commit(client, serial, residual(client, serial))
        return found == expected

    with ThreadPoolExecutor(8) as pool:
        for serial in range(10):
            assert all(pool.map(one, range(24), [serial] * 24))
            kept.settle()
            if serial % 3 == 2:
                kept.flush()
                kept.prune([serial - 2, serial + 1])
                assert len(files(tmp_path)) <= 48


def test_ranks_write_through_and_read_what_another_wrote(tmp_path):
    first = store(tmp_path, shared=True)
    second = ClientStateFiles.joined(str(tmp_path), first.mark(), 7)
    for serial in range(5):
        for client, writer in ((1, first), (2, second)):
            writer.commit(client, serial, residual(client, serial))
        assert [version(kept, c, serial + 1) for kept in (second, first) for c in (1, 2)] == [serial] * 4
    first.prune([5])
    assert files(tmp_path) == ["1_4.residual", "2_4.residual"]


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path):
    first = store(tmp_path / "run", shared=True)
    mark = first.mark()
    with pytest.raises(ClientStateError, match=r"this rank cannot see .*elsewhere: .*share rank 0's folder"):
        ClientStateFiles.joined(str(tmp_path / "elsewhere"), mark, 7)
    store(tmp_path / "own", shared=True).mark()  # a folder of the same name on another machine
    with pytest.raises(ClientStateError, match="this rank cannot see"):
        ClientStateFiles.joined(str(tmp_path / "own"), mark, 7)
    assert first.mark() != mark
