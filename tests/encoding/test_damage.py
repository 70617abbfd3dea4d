"""Decodes 100,000 damaged messages: each raises MessageError and nothing else, in bounded time and memory.

Damage may give another valid message only if the checksum is repaired. Such a message decodes to finite tensors of the
right shape, within the range that the message states.
"""

import functools
import math
import random
import resource
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import PlusOneOverN, Statistics, Zlib

from fedq.encoding import (
    ANS,
    CABAC,
    Decoded,
    Encoder,
    FixedWidth,
    Huffman,
    Key,
    LloydMax,
    MessageError,
    Raw,
    ScaledSign,
    SingularVectors,
    StateDictEncoder,
    StepQuantization,
    TopK,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.message import Reader, varint
from fedq.encoding.testing import reframe, wave
from fedq.encoding.testing.checks import check_damage

KEY = Key(11, 22, 33)
HEADER, CHECKSUM = 44, 4


class Case:
    """A message, and its receiver."""

    def __init__(self, encoder: StateDictEncoder, tensors: dict[str, torch.Tensor], extra: dict[str, torch.Tensor]):
        self.schema = schema_of(tensors)
        adaptation = encoder.bind(self.schema).adaptation
        params = adaptation.params(adaptation.initial_state())
        attached = params | extra
        self.codec = encoder.bind(self.schema, attached=schema_of(attached), reports=True)
        self.message = self.codec.encode(tensors, KEY, params, attached=attached).message
        self.body = self.message[HEADER:-CHECKSUM]
        self.ranges: dict[str, tuple[int, str]] = {}  # offsets of minimum and maximum in the body

    def decode(self, message: bytes, key: Key = KEY) -> Decoded:
        return self.codec.decode(message, key)


def plain() -> Case:
    """Returns a small message with every kind of payload: quantised, entropy coded and exact."""
    case = Case(
        StateDictEncoder(
            Encoder([UniformQuantization(3)], FixedWidth()),
            threshold=6,
            rules={
                "z": Encoder([UniformQuantization(4)], Zlib()),
                "h": Encoder([UniformQuantization(12)], FixedWidth()),
            },
        ),
        {
            "w": wave(5, 3),
            "b": torch.tensor([True, False, True]),
            "n": torch.tensor(7),
            "h": wave(7, dtype=torch.float64),
            "e": torch.zeros(0),
            "s": wave(4, dtype=torch.float16),
            "z": wave(9),
        },
        {},
    )
    case.ranges = {"w": (0, "f"), "h": (8 + 6 + 3 + 8, "d"), "z": (25 + 16 + 11 + 8, "f")}
    return case


def adaptive() -> Case:
    """Returns a message with params and reports of adaptive stages, and with two other attached tensors."""
    return Case(
        StateDictEncoder(
            rules={
                "a": Encoder([PlusOneOverN()]),
                "q": Encoder([UniformQuantization(5), Statistics()], FixedWidth()),
            }
        ),
        {"a": wave(4), "q": wave(12)},
        {"rate": torch.tensor(0.5), "flag": torch.tensor([True, False])},
    )


def frontier() -> Case:
    """Returns a message with singular vectors and symbols in arithmetic code, under a common scale."""
    stages = [SingularVectors(1.0, 3), StepQuantization(1.0, relative=False, rate_weight=0.1, centroids=True)]
    return Case(
        StateDictEncoder(Encoder(stages, CABAC()), 0, common_scale=True),
        {"w": 9 * wave(9, 1) @ wave(1, 8) + wave(9, 8), "r": wave(1, 130), "b": wave(5), "n": torch.tensor([7, 8])},
        {},
    )


CASES = {"plain": plain, "adaptive": adaptive, "frontier": frontier}


@functools.cache
def case_of(name: str) -> Case:
    """Returns a case. The first test that needs the case makes it: numba compiles frontier's loops for seconds."""
    return CASES[name]()


def flips(random: random.Random, data: bytes) -> bytes:
    """Flips one to four bits."""
    damaged = bytearray(data)
    for bit in {random.randrange(8 * len(data)) for _ in range(random.randint(1, 4))}:
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def cuts(random: random.Random, data: bytes) -> bytes:
    """Removes a slice, at the end or elsewhere."""
    start = random.randrange(len(data))
    return data[:start] + data[random.choice((len(data), random.randint(start + 1, len(data)))) :]


def insertions(random: random.Random, data: bytes) -> bytes:
    """Inserts some bytes."""
    place = random.randint(0, len(data))
    return data[:place] + random.randbytes(random.randint(1, 9)) + data[place:]


def duplications(random: random.Random, data: bytes) -> bytes:
    """Repeats a slice, or writes a slice over another one."""
    start, place = random.randrange(len(data)), random.randint(0, len(data))
    part = data[start : start + random.randint(1, 30)]
    return data[:place] + part + data[place + random.choice((0, len(part))) :]


def noise(random: random.Random, data: bytes) -> bytes:
    """Replaces all bytes, or a slice, by random bytes."""
    start = random.choice((0, random.randrange(len(data))))
    return data[:start] + random.randbytes(len(data) - start)


def extremes(random: random.Random, data: bytes) -> bytes:
    """Writes a few bytes of extreme values, such as all ones or all zeros, for huge lengths and floats."""
    place, size = random.randrange(len(data)), random.choice((1, 2, 4, 8))
    word = random.choice(
        (b"\xff" * 8, bytes(8), b"\xff\xff\x7f\x7f" * 2, b"\x00\x00\x80\x7f" * 2, b"\0\0\0\0\0\0\xf0\x7f")
    )
    return data[:place] + word[:size] + data[place + size :]


DAMAGES: list[Callable[[random.Random, bytes], bytes]] = [flips, cuts, insertions, duplications, noise, extremes]


def with_checksum(data: bytes) -> bytes:
    """Returns `data` with the right checksum."""
    return data[:-CHECKSUM] + struct.pack("<I", zlib.crc32(data[:-CHECKSUM]))


def header_field(offset: int, code: str, values: Callable[[random.Random], int | bytes]) -> Callable:
    """Returns a kind of damage: another value in a field of the header, with the right checksum."""

    def write(random: random.Random, data: bytes) -> bytes:
        damaged = bytearray(data)
        struct.pack_into(f"<{code}", damaged, offset, values(random))
        return with_checksum(bytes(damaged))

    return write


HEADERS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "magic": header_field(0, "4s", lambda random: random.randbytes(4)),
    "version": header_field(4, "H", lambda random: random.choice((0, 1, 2, 256, 65_535))),
    "reserved": header_field(6, "H", lambda random: random.randint(1, 65_535)),
    "fingerprint": header_field(8, "8s", lambda random: random.randbytes(8)),
    "seed": header_field(16, "Q", lambda random: random.randrange(12, 2**64)),
    "round": header_field(24, "I", lambda random: random.randrange(23, 2**32)),
    "client": header_field(28, "Q", lambda random: random.randrange(34, 2**64)),
    "length": header_field(36, "Q", lambda random: random.choice((2**60, 2**64 - 1, 2**63, 2**31, 0, 1, 2**20))),
}

# the number of damaged messages of each kind, for each kind of damage and of message
COUNTS = {
    "as it comes": (4_000, len(DAMAGES) * len(CASES)),
    "behind the checksum": (900, len(DAMAGES) * len(CASES)),
    "header": (250, len(HEADERS) * len(CASES)),
    "range": (2_200, 1),
    "trailing": (400, len(CASES)),
    "others": (800, len(CASES)),
}


@contextmanager
def bounded_memory(mebibytes: int = 192) -> Iterator[None]:
    """Limits the growth of the process: larger allocations fail, with an error other than MessageError."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + mebibytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(case: Case, message: bytes, key: Key = KEY) -> bool:
    """Returns whether `message` is refused.

    Otherwise the tensors must fit the schema, be finite, and lie within their range.
    """
    try:
        tensors, front = case.decode(message, key)
    except MessageError as error:
        return bool(str(error))
    assert schema_of(tensors) == case.schema
    assert schema_of(front) == case.codec.attached_schema
    for value in (*tensors.values(), *front.values()):
        assert value.isfinite().all()
    for name, (offset, code) in case.ranges.items():
        low, high = struct.unpack_from(f"<2{code}", message, HEADER + offset)
        slack = 1e-6 * max(abs(low), abs(high)) + 1e-40
        assert low - slack <= float(tensors[name].min()), name
        assert float(tensors[name].max()) <= high + slack, name
    return False


def test_there_are_100_000() -> None:
    assert sum(count * kinds for count, kinds in COUNTS.values()) == 100_000


@pytest.mark.parametrize("name", CASES)
def test_the_whole_message_is_valid(name: str) -> None:
    case = case_of(name)
    assert not refused(case, case.message)
    assert reframe(case.message, case.body) == with_checksum(case.message) == case.message


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", CASES)
def test_damage_as_it_comes(name: str, damage: Callable) -> None:
    case, draw = case_of(name), random.Random(f"{name} {damage.__name__}")
    with bounded_memory():
        for _ in range(COUNTS["as it comes"][0]):
            while (message := damage(draw, case.message)) == case.message:
                pass
            assert refused(case, message)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", CASES)
def test_damage_behind_the_checksum(name: str, damage: Callable) -> None:
    case, draw, count = case_of(name), random.Random(f"{damage.__name__} {name}"), COUNTS["behind the checksum"][0]
    with bounded_memory():
        refusals = sum(refused(case, reframe(case.message, damage(draw, case.body))) for _ in range(count))
    if damage in (cuts, insertions):  # another length
        assert refusals == count
    elif damage is noise:
        assert refusals > count // 2
    else:  # some damage passes the outer layers, and some gives another valid message
        assert 0 < refusals < count


@pytest.mark.parametrize("field", HEADERS)
@pytest.mark.parametrize("name", CASES)
def test_headers(name: str, field: str) -> None:
    case, draw = case_of(name), random.Random(f"{name} {field}")
    with bounded_memory():
        for _ in range(COUNTS["header"][0]):
            assert refused(case, HEADERS[field](draw, case.message))


def test_ranges_that_are_none() -> None:
    case, draw = case_of("plain"), random.Random("range")
    bad = (math.nan, math.inf, -math.inf)
    for _ in range(COUNTS["range"][0]):
        body = bytearray(case.body)
        name, number = draw.choice(list(case.ranges)), 10.0 ** draw.randint(-30, 30)
        offset, code = case.ranges[name]
        pairs = [(draw.choice(bad), number), (-number, draw.choice(bad)), (draw.choice(bad), draw.choice(bad))]
        pairs += [(number, -number), (number, number / 2), (math.nan, math.nan)]
        if name == "h":
            pairs.append((-1.7e308, 1.7e308))  # both are finite, but their difference is not
        struct.pack_into(f"<2{code}", body, offset, *draw.choice(pairs))
        with pytest.raises(MessageError, match=f"'{name}' cannot be decoded"):
            case.decode(reframe(case.message, bytes(body)))


@pytest.mark.parametrize("name", CASES)
def test_trailing_bytes(name: str) -> None:
    case, draw = case_of(name), random.Random(name)
    for i in range(COUNTS["trailing"][0]):
        tail = bytes(1 + i // 4) if i % 2 else draw.randbytes(1 + i // 4)
        with pytest.raises(MessageError, match=r"the end of the body cannot be decoded: \d+ bytes are left"):
            case.decode(reframe(case.message, case.body + tail))


@pytest.mark.parametrize("name", CASES)
def test_messages_for_others(name: str) -> None:
    case, other, draw = case_of(name), case_of("adaptive" if name == "plain" else "plain"), random.Random(name)
    for i in range(COUNTS["others"][0]):
        if i % 2:
            with pytest.raises(MessageError, match="expected seed"):
                case.decode(case.message, KEY._replace(**{draw.choice(Key._fields[:3]): draw.randrange(40, 2**32)}))
        else:
            tensors = {f"w{i}": wave(draw.randint(0, 30))}
            message = StateDictEncoder().bind(schema_of(tensors)).encode(tensors, KEY).message
            with pytest.raises(MessageError, match="schema"):
                case.decode(draw.choice((message, other.message)))


@pytest.mark.parametrize("name", CASES)
def test_memory_stays_within_the_schemas(name: str) -> None:
    # this measures allocations of numpy and Python; bounded_memory() above limits those of torch
    case, draw = case_of(name), random.Random(name)
    messages = [reframe(case.message, draw.choice(DAMAGES)(draw, case.body)) for _ in range(600)]
    messages += [damage(draw, case.message) for damage in HEADERS.values() for _ in range(20)]
    refused(case, case.message)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for message in messages:
            refused(case, message)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 2**17


def test_a_length_on_the_wire_is_not_believed() -> None:
    # a body holds one kind of length: the length of the bytes of a coder, if they depend on the values
    x = {"x": wave(100)}
    codec = StateDictEncoder(rules={"*": Encoder([UniformQuantization(8)], Zlib())}).bind(schema_of(x))
    message = codec.encode(x, KEY).message
    body = message[HEADER:-CHECKSUM]
    size = body[8]
    assert size == len(body) - 9 < 128
    lies = [varint(lie) for lie in (0, 1, size - 1, size + 1, 2**31, 2**32 - 1, 2**63 - 1)]
    # the right length with a zero after it, a length without an end, and no length
    lies += [bytes((size | 0x80, 0)), b"\xff" * 1000, b""]
    with bounded_memory():
        for lie in lies:
            with pytest.raises(MessageError, match="'x'|left over"):
                codec.decode(reframe(message, body[:8] + lie + body[9:]), KEY)


def test_lengths_are_in_leb128() -> None:
    # the examples of the DWARF standard, and the smallest and largest numbers of each length
    known = {2: "02", 127: "7f", 128: "8001", 129: "8101", 12857: "b964", 0: "00", 2**63 - 1: "ff" * 8 + "7f"}
    assert {number: varint(number).hex() for number in known} == known
    for bits in range(63):
        for number in {2**bits - 1, 2**bits}:
            code = varint(number)
            assert len(code) == max(1, -(-number.bit_length() // 7))
            reader = Reader(memoryview(code + b"x"))
            assert reader.read_varint() == number
            assert bytes(reader.read(1)) == b"x"
    for wrong in (b"", b"\x80", b"\x80\x00", b"\xff\x80\x00", b"\xff" * 9 + b"\x01"):
        with pytest.raises(ValueError, match="a length|expected"):
            Reader(memoryview(wrong)).read_varint()


@pytest.mark.parametrize("coder", [ANS(), Huffman(), Raw()])
@pytest.mark.parametrize("stages", [(TopK(0.1), ScaledSign()), (LloydMax(3),), (UniformQuantization(4),)])
def test_symbols_beyond_their_levels_are_refused(stages: tuple, coder: Any) -> None:
    check_damage(Encoder(stages, coder), None)
    x = {"x": wave(100)}
    codec = StateDictEncoder(Encoder(stages[-1:], Raw()), 0).bind(schema_of(x))
    message = codec.encode(x, KEY).message
    forged = message[HEADER : -CHECKSUM - 1] + b"\xff"  # the last symbol
    with pytest.raises(MessageError, match="a symbol is not from 0 to "):
        codec.decode(reframe(message, forged), KEY)


def test_what_is_not_bytes_at_all_or_too_short() -> None:
    for message in (b"", b"FEDQ", bytes(47), bytes(48), case_of("plain").message[:48], memoryview(b"FEDQ" + bytes(60))):
        with pytest.raises(MessageError):
            case_of("plain").decode(message)
