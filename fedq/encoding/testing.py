"""One battery for every stage, coder and chain, yours too; needs the package hypothesis.

    check_stage(MyStage())

runs all of it over a stage and raises AssertionError, or the author's own error, where something is wrong. So does
`check_encoder` over a chain and its coder; `check_coder` takes a coder alone. `bound(x)`, where given, is the largest
error that a stage may make on the elements of `x`, or NaN where it may refuse `x`; a lossless chain's is 0.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.coders import Coder, FixedWidth, Raw
from fedq.encoding.encoder import ByPlace, Encoder
from fedq.encoding.message import OVERHEAD, MessageError
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.encoding.state_dict import ByTensor, EncodeError, StateDictEncoder, flatten, schema_of
from fedq.keys import Key

Bound = Callable[[Tensor], float]

KEY = Key(seed=2**64 - 1, round=7, client=3)
DRAWS, KEYS = 10_000, 100  # what a claim of unbiasedness is tested with: draws of each value, in as many tensors


def wave(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns values in (−1, 1), all different, from arithmetic."""
    n = math.prod(shape)
    return ((torch.arange(n, dtype=torch.float64) * 0.6180339887498949) % 2 - 1).reshape(shape).to(dtype)


def floating_inputs() -> dict[str, Tensor]:
    """Returns the finite floating tensors that every chain takes."""
    f64 = torch.float64
    return {
        "zeros": torch.zeros(3, 4),
        "minus zero": torch.full((5,), -0.0),
        "constant": torch.full((50,), 0.1),
        "negative constant": torch.full((50,), -0.1),
        "one element": torch.tensor([-2.5]),
        "0-d": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "empty matrix": torch.zeros(3, 0, 2),
        "two values": torch.tensor([-1.0, 3.0]),
        "vector": wave(1001),
        "transposed": wave(7, 5).t(),
        "every third": wave(90)[::3],
        "one of a column": wave(3, 2)[1:2, 1],
        "none of a column": wave(3, 2)[3:, 1],
        "expanded": wave(5).expand(4, 5),
        "channels last": wave(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "float16": wave(101, dtype=torch.float16),
        "float16 at its limits": torch.tensor([-65504.0, 0.0, 6e-8, 65504.0], dtype=torch.float16),
        "bfloat16": wave(101, dtype=torch.bfloat16),
        "float64": wave(101, dtype=f64),
        "far from zero": 1e6 + wave(101),
        "huge": torch.tensor([-3e38, 1.0, 3e38]),
        "float32's maximum": torch.tensor([torch.finfo(torch.float32).min, torch.finfo(torch.float32).max]),
        "huge bfloat16": torch.tensor([-3e38, 1.0, 3e38], dtype=torch.bfloat16),
        "huge float64": torch.tensor([0.0, 1.0, 1e308], dtype=f64),
        "float64's maximum": torch.tensor([0.0, 3e307, torch.finfo(f64).max], dtype=f64),
        "denormal": wave(101) * 1e-40,
        "denormal float16": torch.arange(9, dtype=torch.float16) * 6e-8,
        "denormal float64": wave(101, dtype=f64) * 1e-309,
        "the smallest": torch.tensor([0.0, 5e-324, 1e-323], dtype=f64),
    }


def large_input() -> Tensor:
    """Returns a tensor larger than what most stages work on at a time."""
    return wave(2**18 + 5)


def largest_input() -> Tensor:
    """Returns over two million elements: no stage or coder works on half as many at a time."""
    return wave(1100, 2000)


def exact_inputs() -> dict[str, Tensor]:
    """Returns the integer and boolean tensors that travel exact whatever the chain."""
    return {
        "int64 0-d": torch.tensor(2**62 + 1),
        "int64": torch.arange(-500, 501) * (2**53 + 1),
        "int32": torch.arange(-50, 51, dtype=torch.int32),
        "int16 transposed": torch.arange(24, dtype=torch.int16).reshape(4, 6).t(),
        "uint8": torch.arange(256).to(torch.uint8),
        "bool": torch.arange(101) % 3 == 0,
        "bool 0-d": torch.tensor(True),
        "one int64 of a column": torch.arange(6).reshape(3, 2)[1:2, 1],
        "no int64": torch.zeros(0, 3, dtype=torch.int64),
    }


def refused_inputs() -> dict[str, Tensor]:
    """Returns floating tensors that are never sent."""
    bad = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}
    inputs = {name: torch.tensor([0.0, value, 1.0]) for name, value in bad.items()}
    inputs |= {f"{name} alone": torch.tensor(value) for name, value in bad.items()}
    inputs |= {f"{name} in float16": torch.tensor([1.0, value], dtype=torch.float16) for name, value in bad.items()}
    return inputs | {"both infinities": torch.tensor([math.inf, -math.inf], dtype=torch.float64)}


def check_stage(
    stage: EncodingStage | AdaptiveEncodingStage, bound: Bound | None = None, coder: Coder | None = None
) -> None:
    """Runs the whole battery over a stage, with `coder` or the plain one that fits its symbols."""
    if coder is None:
        encoder, spec = Encoder([stage]), TensorSpec.of(wave(4))
        for _, side, _ in _steps(encoder, wave(4)):
            spec = stage.encoded_spec(spec, side)
        coder = Raw() if spec.levels is None else FixedWidth()
    check_encoder(Encoder([stage], coder), bound)


def check_encoder(encoder: Encoder, bound: Bound | None = None) -> None:
    """Runs the whole battery over a chain and its coder."""
    for check in CHECKS:
        check(encoder, bound)


# ---------------------------------------------------------------------------------------------- the checks


def check_dataclasses(encoder: Encoder, bound: Bound | None) -> None:
    """Stages and coder are frozen, equal to their copies, and their repr tells all arguments."""
    for part in (*encoder.stages, encoder.coder):
        assert part == copy.deepcopy(part), f"{part} differs from its copy"
        assert getattr(part, "__dataclass_params__").frozen, f"{type(part).__name__} is not frozen"  # noqa: B009  # unknown to mypy
        for field in dataclasses.fields(part):  # type: ignore[arg-type]  # Encoder takes no others
            assert field.repr, f"{type(part).__name__} hides {field.name} from its repr, hence from the schema"
        assert "0x" not in repr(part), f"the repr of {type(part).__name__} holds an address: {part!r}"


def check_round_trip(encoder: Encoder, bound: Bound | None) -> None:
    """Shape and dtype come back, contiguous or not; values within the bound."""
    for name, x in floating_inputs().items():
        _round_trip(encoder, bound, name, x)


def check_arbitrary_arrays(encoder: Encoder, bound: Bound | None) -> None:
    """The same for whatever hypothesis thinks of."""
    import hypothesis.extra.numpy as arrays
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    dtypes = st.sampled_from([np.float16, np.float32, np.float64])
    shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)

    def elements(dtype: type) -> st.SearchStrategy[np.ndarray]:
        finite = arrays.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
        return arrays.arrays(dtype, shapes, elements=finite)

    @settings(max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(dtypes.flatmap(elements))
    def check(array: np.ndarray) -> None:
        _round_trip(encoder, bound, f"hypothesis's {array!r}", torch.from_numpy(array))

    check()


def check_largest_input(encoder: Encoder, bound: Bound | None) -> None:
    """The same for millions of elements."""
    x = largest_input()
    _round_trip(encoder, bound, f"{x.numel():,} elements", x)


def check_exact_tensors(encoder: Encoder, bound: Bound | None) -> None:
    """Integers and booleans travel exact in their own dtype, whatever their number."""
    for name, x in exact_inputs().items():
        by_dtype = StateDictEncoder(encoder, threshold=0)
        message, _ = by_dtype.encode({"x": x}, KEY)
        assert _same(by_dtype.decode(message, KEY, schema_of({"x": x}))[0]["x"], x), f"{name} is not exact"


def check_refusals(encoder: Encoder, bound: Bound | None) -> None:
    """NaN and infinity are an EncodeError that names the tensor."""
    for name, x in refused_inputs().items():
        try:
            _message(encoder, x)
        except EncodeError as error:
            if "'x'" not in str(error):
                raise AssertionError(f"{name}: the error does not name the tensor: {error}") from error
        else:
            raise AssertionError(f"{name} is sent")


def check_input_untouched(encoder: Encoder, bound: Bound | None) -> None:
    """Neither encode nor decode writes to what it is given."""
    for name, x in _taken(encoder).items():
        before, version = x.clone(), x._version
        for y, side, decode in _steps(encoder, x):
            given = [y.clone(), *(value.clone() for value in side.values())]
            decode(y)
            assert all(map(_same, given, [y, *side.values()])), f"{name}: {type(encoder).__name__}.decode wrote to y"
        assert _same(x, before), f"{name} is changed"
        assert x._version == version, f"{name} is written to"


def check_aliasing(encoder: Encoder, bound: Bound | None) -> None:
    """What is decoded is the receiver's own: writing to it changes neither the message nor the input."""
    for name, x in _taken(encoder).items():
        message, before = _message(encoder, x), x.clone()
        copy, first = bytes(bytearray(message)), _decode(encoder, message, x)
        again = first.clone()
        first.fill_(1)
        assert message == copy, f"{name}: the message is changed"
        assert _same(_decode(encoder, message, x), again), f"{name}: decodes to something else the second time"
        assert _same(x, before), f"{name} is changed"


def check_same_key(encoder: Encoder, bound: Bound | None) -> None:
    """The same key gives the same bytes, from an equal encoder too, and leaves global random states alone.

    What is decoded follows from the message: it is the same for a receiver of its own, after other messages.
    """
    inputs = _taken(encoder) | {"large": large_input()}
    states = _global_random_states()
    receiver, messages = copy.deepcopy(encoder), {name: _message(encoder, x) for name, x in inputs.items()}
    decoded = {name: _decode(receiver, messages[name], x) for name, x in inputs.items()}
    assert _global_random_states() == states, "a global random state is used"
    equal = copy.deepcopy(encoder)
    for name, x in inputs.items():
        assert _message(equal, x) == messages[name], f"{name}: the same key gives other bytes"
        again = _message(encoder, x.contiguous())
        assert again == messages[name], (
            f"{name}: the layout in memory matters; torch adds up in its order, unless x.reshape(-1) comes first"
        )
        assert _same(_decode(encoder, again, x), decoded[name]), f"{name}: something reaches decode beside the message"


def check_other_keys(encoder: Encoder, bound: Bound | None) -> None:
    """Another seed, round, client or tensor gives other bytes where the chain is random.

    Random is what claims to be right on average, but is not right each time. What commutes with the sum may draw
    the same for all clients of a round.
    """
    x = wave(25, 40)
    if not unbiased(encoder) or torch.allclose(_send(encoder, x), x, rtol=1e-5, atol=1e-5):
        return
    keys = [KEY, KEY._replace(seed=1), KEY._replace(round=8), KEY.fold("x"), KEY.fold("y")]
    if not all(stage.commutes_with_sum for stage in encoder.stages):
        keys.append(KEY._replace(client=4))
    params = initial_params(encoder, TensorSpec.of(x))
    payloads = {b"".join(encoder.encode(x, key, params)[0]) for key in keys}
    assert len(payloads) == len(keys), "two keys give the same bytes"


def check_length(encoder: Encoder, bound: Bound | None) -> None:
    """A message is its frame, and for each tensor single side values of at most 16 bytes and the coded symbols.

    Streams of side values, such as a mask or a range for each channel, come on top of the 16 bytes, as does the length
    of each stream whose size depends on its values.
    """
    messages = _messages(encoder)
    for name, x in _taken(encoder).items():
        spec, single, total, fixed = TensorSpec.of(x), 0, 0, True
        for stage, (_, side, _) in zip(encoder.stages, _steps(encoder, x), strict=True):
            for value, side_spec in stage.side_spec(spec).items():
                size = stage.side_coder(value).size(side_spec)
                single += (size or 0) if not side_spec.shape else 0
                total, fixed = total + (size or 0), fixed and size is not None
            spec = stage.encoded_spec(spec, side)
        assert single <= 16, f"{name}: {single} bytes beside the symbols"
        size = encoder.coder.size(spec) if isinstance(encoder.coder, Coder) else None
        if fixed and size is not None:
            length = len(messages[name])
            assert length == OVERHEAD + total + size, f"{name}: {length} bytes, not {OVERHEAD} + {total} + {size}"
        if isinstance(encoder.coder, FixedWidth):
            assert spec.levels is not None
            bits = max(1, math.ceil(math.log2(spec.levels)))
            assert size == math.ceil(spec.numel * bits / 8), f"{name}: {size} bytes for {spec.numel} × {bits} bits"
    assert len(StateDictEncoder(encoder).encode({}, KEY)[0]) <= 64, "the frame has more than 64 bytes"


def check_damage(encoder: Encoder, bound: Bound | None) -> None:
    """A message that is cut, or has bytes left over, is a MessageError even where its frame is right.

    One with other values decodes to a finite tensor of the right shape, or is a MessageError too, and nothing else.
    """
    for name, x in {"vector": wave(101), "matrix": wave(8, 13), "empty": wave(0), "one element": wave(1)}.items():
        message = _message(encoder, x)
        body = message[44:-4]
        for damaged in (body + b"\0", body[:-1], body[:4], body + body):
            if damaged != body:
                try:
                    _decode(encoder, reframe(message, damaged), x)
                except MessageError:
                    continue
                raise AssertionError(f"{name}: {len(damaged)} bytes are taken for {len(body)}")
        noise = KEY.bits(24 * len(body), 8).tobytes()
        others = [bytes([value]) * len(body) for value in (0, 1, 127, 128, 255)]
        others += [noise[i * len(body) :][: len(body)] for i in range(8)]
        others += [body[:i] + noise[i : i + 1] + body[i + 1 :] for i in range(min(len(body), 24))]
        for damaged in others:
            with contextlib.suppress(MessageError):
                _decode(encoder, reframe(message, damaged), x)


def check_lossless(encoder: Encoder, bound: Bound | None) -> None:
    """A chain whose stages all claim to be lossless gives back the same bits."""
    if lossless(encoder):
        for name, x in floating_inputs().items():
            assert raw_bytes(_send(encoder, x)) == raw_bytes(x), (
                f"{name} is not exact, but {encoder} claims to be lossless"
            )


def check_unbiased(encoder: Encoder, bound: Bound | None) -> None:
    """A chain whose stages all claim to be unbiased is right on average: 10,000 draws, within 4 standard errors.

    Each value stands 100 times in a tensor, and there are 100 keys. Draws under one key may depend on each other,
    so that the standard error is that of the keys' means.
    """
    if not unbiased(encoder):
        return
    values = torch.tensor([-1.0, -0.99, -0.71, -0.2, 0.0, 0.013, 0.3331, 0.5, 0.97, 1.0], dtype=torch.float64)
    x = values.float().repeat(DRAWS // KEYS).view(-1, 4 * len(values))  # a matrix, as some stages need
    means = torch.stack(
        [_send(encoder, x, KEY.fold(str(i))).double().view(-1, len(values)).mean(0) for i in range(KEYS)]
    )
    error, standard = (means.mean(0) - values.float().double()).abs(), means.std(0) / math.sqrt(KEYS)
    assert bool((error <= 4 * standard + 1e-6).all()), (
        f"{encoder} claims to be unbiased, but its mean over {DRAWS} draws is off by {(error / standard).tolist()} "
        "standard errors"
    )


def check_commutes_with_sum(encoder: Encoder, bound: Bound | None) -> None:
    """A stage that claims so may be decoded once, after the clients' sum: decode(encode(x) + encode(y)).

    So may all such in front of a chain: a weighted sum comes out as that of tensors which are decoded one by one.
    """
    clients = [KEY._replace(client=client) for client in (KEY.client, KEY.client + 1, 2**40)]
    for stage in encoder.stages:
        if not stage.commutes_with_sum:
            continue
        for shape in ((), (1,), (0,), (13,), (64,), (3, 5), (50, 70)):
            x, y = wave(*shape, dtype=torch.float64), wave(*shape, dtype=torch.float64).flip(0 if shape else ()) * 3 + 1
            spec, alone = TensorSpec.of(x), Encoder([stage])
            assert not stage.side_spec(spec), f"{stage} claims to commute with the sum, but has side values"
            (a, _, decode), (b, _, decode_b) = next(_steps(alone, x)), next(_steps(alone, y, clients[1]))
            assert torch.allclose(decode(a + b), decode(a) + decode_b(b), rtol=1e-9, atol=1e-9), (
                f"{stage} does not commute with the sum"
            )
    for x in (wave(1001), wave(50, 70), wave(50, 70, dtype=torch.float64)):
        if not encoder.front(TensorSpec.of(x)):
            continue
        chain, schema = StateDictEncoder(rules={"x": encoder}), schema_of({"x": x})
        params, apart, total = chain.params(schema, chain.initial_state(schema)), torch.zeros(()), torch.zeros(())
        for weight, key in zip((1, 20, 0.3), clients, strict=True):
            message, _ = chain.encode({"x": x.roll(key.client)}, key, params)
            whole, part = (chain.decode(message, key, schema, params, partly=partly)[0] for partly in (False, True))
            assert _same(whole["x"], chain.finish(part, key, schema, params)["x"]), f"{encoder}: decoded in two ways"
            apart, total = apart + weight * whole["x"], total + weight * part["x"]
        once = chain.finish({"x": total}, clients[0], schema, params)["x"]
        error, norm = float((once - apart).norm()), float(apart.norm())
        assert error <= 1e-5 * norm, f"{encoder}: decoded after the sum over clients, it is off by {error / norm}"


def check_state(encoder: Encoder, bound: Bound | None) -> None:
    """An adaptive part's state takes the reports of cohorts of one, two and three clients, and follows from them alone.

    What the clients need of it has the same shapes and dtypes in every round, is never written to, and serves every
    round's messages as the first's: within the bound.
    """
    if not encoder.adaptive():
        return
    chain, schema = StateDictEncoder(rules={"x": encoder}), schema_of({"x": wave(10, 20)})
    state, agreed = chain.initial_state(schema), None
    for clients in (1, 2, 3, 1):
        for own in state["x"].values():
            for name, value in own.items():
                assert isinstance(value, Tensor), f"{encoder}: the state's {name!r} is not a tensor, but {value!r}"
        params, reports, before = chain.params(schema, state), [], copy.deepcopy(state)
        found = {place: schema_of(own) for place, own in params["x"].items()}
        agreed = agreed or found
        assert found == agreed, f"{encoder}: params change from {agreed} to {found}"
        sent = copy.deepcopy(params)
        for client in range(clients):
            key = KEY._replace(round=clients, client=client)
            x = wave(10, 20) * (client - 1) - 0.01
            message, _ = chain.encode({"x": x}, key, params, report=True)
            back, own = chain.decode(message, key, schema, params, chain.update_spec(schema))
            reports.append(chain.report(schema, own))
            error, allowed = float((back["x"].double() - x.double()).abs().max()), bound(x) if bound else math.inf
            assert error <= (0 if lossless(encoder) else allowed), f"{encoder}: an error of {error} once it has learnt"
        assert _all_same(params, sent), f"{encoder}: encode or decode writes to params"
        total = reports[0]
        for own in reports[1:]:
            total = chain.combine(schema, total, own)
        after, again = (chain.update_state(schema, state, total) for _ in range(2))
        assert _all_same(state, before), f"{encoder}: update_state writes to the state"
        assert _all_same(after, again), f"{encoder}: update_state gives another state the second time"
        state = after


CHECKS: tuple[Callable[[Encoder, Bound | None], None], ...] = (
    check_dataclasses,
    check_round_trip,
    check_arbitrary_arrays,
    check_largest_input,
    check_exact_tensors,
    check_refusals,
    check_input_untouched,
    check_same_key,
    check_aliasing,
    check_other_keys,
    check_length,
    check_damage,
    check_lossless,
    check_unbiased,
    check_commutes_with_sum,
    check_state,
)


def check_coder(coder: Coder, levels: int | None, dtype: torch.dtype) -> None:
    """A coder gives every tensor of symbols back, in the bytes that `size` tells, and leaves it alone."""
    for shape in ((), (0,), (1,), (7,), (8,), (70,), (3, 0), (5, 3), (2, 3, 2, 2), (1000,)):
        for strided in (False, True):
            n = math.prod(shape)
            symbols = (torch.arange(2 * n) * 40_503) % (levels or 251)
            symbols = symbols.to(dtype).reshape(*shape, 2)[..., 0] if strided else symbols[:n].to(dtype).reshape(shape)
            for x in (symbols, torch.zeros_like(symbols), torch.full_like(symbols, (levels or 251) - 1)):
                spec, before = TensorSpec(shape, dtype, levels), x.clone()
                data = coder.encode(x, spec)
                assert coder.size(spec) in (None, len(data)), f"{coder} tells another size than {len(data)}"
                back = coder.decode(memoryview(data), spec)
                assert _same(back, before), f"{coder} gives another tensor of {shape}"
                assert _same(x, before), f"{coder} writes to its input"
                back.fill_(0)  # the receiver's own, writable without a warning
                assert coder.encode(x, spec) == data, f"{coder} gives other bytes the second time"


def lossless(encoder: Encoder) -> bool:
    """Tells whether all stages claim to be lossless."""
    return all(stage.lossless for stage in encoder.stages)


def unbiased(encoder: Encoder) -> bool:
    """Tells whether all stages claim to be unbiased or lossless, and there is one."""
    return bool(encoder.stages) and all(stage.unbiased or stage.lossless for stage in encoder.stages)


def reframe(message: bytes, body: bytes) -> bytes:
    """Returns `message` with another body, its length and checksum made right."""
    head = message[:36] + struct.pack("<Q", len(body)) + body
    return head + struct.pack("<I", zlib.crc32(head))


def _global_random_states() -> tuple[object, ...]:
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state(legacy=False)), random.getstate()


def initial_params(encoder: Encoder, spec: TensorSpec) -> ByPlace:
    """Returns the first round's params of a chain's adaptive parts."""
    return {place: part.params(part.initial_state(spec)) for place, part in encoder.adaptive().items()}


def _steps(encoder: Encoder, x: Tensor, key: Key = KEY) -> Iterator[tuple[Tensor, Tensors, Callable[[Tensor], Tensor]]]:
    """Yields what each stage of a chain gives for `x`: y, side values, and what decodes such a y."""
    spec, params = TensorSpec.of(x), initial_params(Encoder(encoder.stages), TensorSpec.of(x))
    for i, stage in enumerate(encoder.stages):
        own = key.fold("x").fold(str(i))
        if isinstance(stage, AdaptiveEncodingStage):
            y, side, _ = stage.encode(x, own, params[i])
            decode = functools.partial(stage.decode, side=side, spec=spec, key=own, params=params[i])
        else:
            y, side = stage.encode(x, own)
            decode = functools.partial(stage.decode, side=side, spec=spec, key=own)
        yield y, side, decode
        x, spec = y, stage.encoded_spec(spec, side)


_last: tuple[Encoder | None, dict[str, bytes]] = (None, {})
"""The chain whose messages were asked for last, and these: four checks in a row ask."""


def _messages(encoder: Encoder) -> dict[str, bytes]:
    """Returns the messages of the floating inputs but those that the chain refuses; not fresh ones."""
    global _last
    if _last[0] is not encoder:
        messages = {}
        for name, x in floating_inputs().items():
            with contextlib.suppress(EncodeError):
                messages[name] = _message(encoder, x)
        _last = encoder, messages
    return _last[1]


def _taken(encoder: Encoder) -> dict[str, Tensor]:
    """Returns the floating inputs without those that the chain refuses; check_round_trip tells which it may."""
    messages = _messages(encoder)
    return {name: x for name, x in floating_inputs().items() if name in messages}


def _message(encoder: Encoder, x: Tensor, key: Key = KEY) -> bytes:
    chain, schema = StateDictEncoder(rules={"x": encoder}), schema_of({"x": x})
    return chain.encode({"x": x}, key, chain.params(schema, chain.initial_state(schema)))[0]


def _decode(encoder: Encoder, message: bytes, x: Tensor, key: Key = KEY) -> Tensor:
    chain, schema = StateDictEncoder(rules={"x": encoder}), schema_of({"x": x})
    return chain.decode(message, key, schema, chain.params(schema, chain.initial_state(schema)))[0]["x"]


def _send(encoder: Encoder, x: Tensor, key: Key = KEY) -> Tensor:
    return _decode(encoder, _message(encoder, x, key), x, key)


def _round_trip(encoder: Encoder, bound: Bound | None, name: str, x: Tensor) -> None:
    try:
        y = _send(encoder, x)
    except EncodeError:
        if bound is not None and x.numel() and math.isnan(bound(x)):
            return
        # else allowed only where the sum of squares is beyond the dtype that the stage works in
        limit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).max
        assert x.numel(), f"{name} is refused"
        assert float(x.double().abs().max()) >= math.sqrt(limit / x.numel()), f"{name} is refused"
        return
    assert y.shape == x.shape, f"{name}: {tuple(x.shape)} comes back as {tuple(y.shape)}"
    assert y.dtype == x.dtype, f"{name}: {x.dtype} comes back as {y.dtype}"
    if bound is not None and x.numel():
        error = float((x.double() - y.double()).abs().max())
        assert not error > bound(x), f"{name}: an error of {error}, at most {bound(x)} is allowed"


def raw_bytes(x: Tensor) -> bytes:
    """Returns the elements of `x`, in row-major order, as bytes."""
    return torch.empty(x.numel(), dtype=x.dtype).copy_(x.reshape(-1)).view(torch.uint8).numpy().tobytes()


def _all_same(x: ByTensor, y: ByTensor) -> bool:
    flat, other = flatten(x), flatten(y)
    return flat.keys() == other.keys() and all(_same(flat[path], other[path]) for path in flat)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and raw_bytes(x) == raw_bytes(y)
