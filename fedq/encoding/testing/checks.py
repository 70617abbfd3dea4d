"""The checks of the battery. Each takes a chain and, if known, the largest error allowed."""

import contextlib
import copy
import dataclasses
import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.codec import EncodeError
from fedq.encoding.coders import FixedWidth, Raw
from fedq.encoding.encoder import Encoder
from fedq.encoding.message import OVERHEAD, MessageError
from fedq.encoding.schema import TensorSpec, schema_of
from fedq.encoding.testing import chain
from fedq.encoding.testing.chain import KEY
from fedq.encoding.testing.inputs import exact_inputs, floating_inputs, large_input, largest_input, refused_inputs, wave

Bound = Callable[[Tensor], float]
"""The largest error of a chain on an element of a tensor, or NaN for a tensor that the chain may refuse."""

ARRAYS = 20
"""The number of arrays that hypothesis draws for a chain."""

DRAWS, KEYS = 10_000, 100
"""Numbers of draws of each value, and of keys, in a test of unbiasedness."""


def check_dataclasses(encoder: Encoder, bound: Bound | None) -> None:
    """Stages and coder are frozen and equal to their copies; their repr shows all arguments."""
    for part in (*encoder.stages, encoder.coder):
        assert part == copy.deepcopy(part), f"{part} differs from its copy"
        assert getattr(part, "__dataclass_params__").frozen, f"{type(part).__name__} is not frozen"  # noqa: B009  # unknown to mypy
        for field in dataclasses.fields(part):  # type: ignore[arg-type]  # Encoder takes no others
            assert field.repr, f"{type(part).__name__} hides {field.name} from its repr, hence from the schema"
        assert "0x" not in repr(part), f"the repr of {type(part).__name__} holds an address: {part!r}"


def check_round_trip(encoder: Encoder, bound: Bound | None) -> None:
    """Decoded tensors have the shape and dtype of the input, contiguous or not, and errors within the bound."""
    for name, x in floating_inputs().items():
        _round_trip(encoder, bound, name, x)


def check_arbitrary_arrays(encoder: Encoder, bound: Bound | None) -> None:
    """Runs the same checks on arrays that hypothesis draws."""
    import hypothesis.extra.numpy as arrays
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    dtypes = st.sampled_from([np.float16, np.float32, np.float64])
    shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)

    def elements(dtype: type) -> st.SearchStrategy[np.ndarray]:
        finite = arrays.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
        return arrays.arrays(dtype, shapes, elements=finite)

    every = list(HealthCheck)

    @settings(max_examples=ARRAYS, derandomize=True, database=None, deadline=None, suppress_health_check=every)
    @given(dtypes.flatmap(elements))
    def check(array: np.ndarray) -> None:
        _round_trip(encoder, bound, f"hypothesis's {array!r}", torch.from_numpy(array))

    check()


def check_largest_input(encoder: Encoder, bound: Bound | None) -> None:
    """Runs the same checks on a tensor of millions of elements."""
    x = largest_input()
    _round_trip(encoder, bound, f"{x.numel():,} elements", x)


def check_exact_tensors(encoder: Encoder, bound: Bound | None) -> None:
    """Integers and booleans are sent exact in their own dtype, whatever their number."""
    for name, x in exact_inputs().items():
        wire = chain.Wire(encoder, x, threshold=0)
        message = wire.encode(x, KEY, wire.params())
        assert chain.same(wire.decode(message, KEY, wire.params()), x), f"{name} is not exact"


def check_refusals(encoder: Encoder, bound: Bound | None) -> None:
    """NaN and infinity raise an EncodeError with the tensor's name."""
    for name, x in refused_inputs().items():
        try:
            chain.encode(encoder, x)
        except EncodeError as error:
            if "'x'" not in str(error):
                raise AssertionError(f"{name}: the error does not name the tensor: {error}") from error
        else:
            raise AssertionError(f"{name} is sent")


def check_input_untouched(encoder: Encoder, bound: Bound | None) -> None:
    """Neither encode nor decode writes to its input."""
    for name, x in chain.taken(encoder).items():
        before, version = x.clone(), x._version
        for y, side, decode_stage in chain.steps(encoder, x):
            given = [y.clone(), *(value.clone() for value in side.values())]
            decode_stage(y)
            assert all(map(chain.same, given, [y, *side.values()])), (
                f"{name}: {type(encoder).__name__}.decode wrote to y"
            )
        assert chain.same(x, before), f"{name} is changed"
        assert x._version == version, f"{name} is written to"


def check_aliasing(encoder: Encoder, bound: Bound | None) -> None:
    """A decoded tensor has its own memory: writing to it changes neither the message nor the input."""
    for name, x in chain.taken(encoder).items():
        message, before = chain.encode(encoder, x), x.clone()
        copy, first = bytes(bytearray(message)), chain.decode(encoder, message, x)
        again = first.clone()
        first.fill_(1)
        assert message == copy, f"{name}: the message is changed"
        assert chain.same(chain.decode(encoder, message, x), again), (
            f"{name}: decodes to something else the second time"
        )
        assert chain.same(x, before), f"{name} is changed"


def check_same_key(encoder: Encoder, bound: Bound | None) -> None:
    """The same key gives the same bytes, also from an equal encoder, and changes no global random state.

    A decoded tensor depends only on the message: another receiver, after other messages, decodes the same tensor.
    """
    inputs = chain.taken(encoder) | {"large": large_input()}
    states = _global_random_states()
    receiver, messages = copy.deepcopy(encoder), {name: chain.encode(encoder, x) for name, x in inputs.items()}
    decoded = {name: chain.decode(receiver, messages[name], x) for name, x in inputs.items()}
    assert _global_random_states() == states, "a global random state is used"
    equal = copy.deepcopy(encoder)
    for name, x in inputs.items():
        assert chain.encode(equal, x) == messages[name], f"{name}: the same key gives other bytes"
        again = chain.encode(encoder, x.contiguous())
        assert again == messages[name], (
            f"{name}: the layout in memory matters; torch adds up in its order, unless x.reshape(-1) comes first"
        )
        assert chain.same(chain.decode(encoder, again, x), decoded[name]), (
            f"{name}: something reaches decode beside the message"
        )


def check_other_keys(encoder: Encoder, bound: Bound | None) -> None:
    """Another seed, round, client or tensor gives other bytes if the chain is random.

    A chain is random if it claims to be unbiased, and is not exact. Stages that commute with a sum may draw the same
    numbers for all clients of a round.
    """
    x = wave(25, 40)
    if not chain.unbiased(encoder) or torch.allclose(chain.send(encoder, x), x, rtol=1e-5, atol=1e-5):
        return
    keys = [KEY, KEY._replace(seed=1), KEY._replace(round=8), KEY.fold("x"), KEY.fold("y")]
    if not all(stage.commutes_with_sum for stage in encoder.stages):
        keys.append(KEY._replace(client=4))
    wire = chain.Wire(encoder, x)
    payloads = {b"".join(wire.codec.chains["x"].encode(x, key, wire.params())[0]) for key in keys}
    assert len(payloads) == len(keys), "two keys give the same bytes"


def check_length(encoder: Encoder, bound: Bound | None) -> None:
    """A message has its frame and, for each tensor, at most 16 bytes of single side values and the coded symbols.

    Streams of side values, such as a mask or the ranges of channels, add their bytes. If the size of a stream depends
    on the values, its length adds bytes too.
    """
    messages = chain.messages_of(encoder)
    for name, x in chain.taken(encoder).items():
        spec, single, total, fixed = TensorSpec.of(x), 0, 0, True
        for stage, (_, side, _) in zip(encoder.stages, chain.steps(encoder, x), strict=True):
            for value, side_spec in stage.side_spec(spec).items():
                size = stage.side_coders.get(value, Raw()).size(side_spec)
                single += (size or 0) if not side_spec.shape else 0
                total, fixed = total + (size or 0), fixed and size is not None
            spec = stage.encoded_spec(spec, side)
        assert single <= 16, f"{name}: {single} bytes beside the symbols"
        size = encoder.coder.size(spec)
        if fixed and size is not None:
            length = len(messages[name])
            assert length == OVERHEAD + total + size, f"{name}: {length} bytes, not {OVERHEAD} + {total} + {size}"
        if isinstance(encoder.coder, FixedWidth):
            assert spec.levels is not None
            bits = max(1, math.ceil(math.log2(spec.levels)))
            assert size == math.ceil(spec.numel * bits / 8), f"{name}: {size} bytes for {spec.numel} × {bits} bits"


def check_damage(encoder: Encoder, bound: Bound | None) -> None:
    """A message with too few or too many bytes raises MessageError, even if its frame is right.

    A message with other values decodes to a finite tensor of the right shape, or raises only MessageError.
    """
    for name, x in {"vector": wave(101), "matrix": wave(8, 13), "empty": wave(0), "one element": wave(1)}.items():
        message = chain.encode(encoder, x)
        body = message[44:-4]
        for damaged in (body + b"\0", body[:-1], body[:4], body + body):
            if damaged != body:
                try:
                    chain.decode(encoder, chain.reframe(message, damaged), x)
                except MessageError:
                    continue
                raise AssertionError(f"{name}: {len(damaged)} bytes are taken for {len(body)}")
        noise = KEY.bits(24 * len(body), 8).tobytes()
        others = [bytes([value]) * len(body) for value in (0, 1, 127, 128, 255)]
        others += [noise[i * len(body) :][: len(body)] for i in range(8)]
        others += [body[:i] + noise[i : i + 1] + body[i + 1 :] for i in range(min(len(body), 24))]
        for damaged in others:
            with contextlib.suppress(MessageError):
                chain.decode(encoder, chain.reframe(message, damaged), x)


def check_lossless(encoder: Encoder, bound: Bound | None) -> None:
    """A chain whose stages all claim to be lossless decodes the same bits."""
    if chain.lossless(encoder):
        for name, x in floating_inputs().items():
            assert chain.raw_bytes(chain.send(encoder, x)) == chain.raw_bytes(x), (
                f"{name} is not exact, but {encoder} claims to be lossless"
            )


def check_unbiased(encoder: Encoder, bound: Bound | None) -> None:
    """A chain whose stages all claim to be unbiased has the right mean, within 4 standard errors of 10,000 draws.

    A tensor holds each value 100 times, and is sent under 100 keys. Draws under one key may depend on each other, so
    the standard error is computed from the means of keys.
    """
    if not chain.unbiased(encoder):
        return
    values = torch.tensor([-1.0, -0.99, -0.71, -0.2, 0.0, 0.013, 0.3331, 0.5, 0.97, 1.0], dtype=torch.float64)
    x = values.float().repeat(DRAWS // KEYS).view(-1, 4 * len(values))  # a matrix: some stages keep vectors unchanged
    means = torch.stack(
        [chain.send(encoder, x, KEY.fold(str(i))).double().view(-1, len(values)).mean(0) for i in range(KEYS)]
    )
    error, standard = (means.mean(0) - values.float().double()).abs(), means.std(0) / math.sqrt(KEYS)
    assert bool((error <= 4 * standard + 1e-6).all()), (
        f"{encoder} claims to be unbiased, but its mean over {DRAWS} draws is off by {(error / standard).tolist()} "
        "standard errors"
    )


def check_commutes_with_sum(encoder: Encoder, bound: Bound | None) -> None:
    """A stage that claims to commute may be decoded once, after the clients' sum: decode(encode(x) + encode(y)).

    The same holds for all such stages at the front of a chain: a weighted sum decoded once equals the weighted sum of
    decoded tensors.
    """
    clients = [KEY._replace(client=client) for client in (KEY.client, KEY.client + 1, 2**40)]
    for stage in encoder.stages:
        if not stage.commutes_with_sum:
            continue
        for shape in ((), (1,), (0,), (13,), (64,), (3, 5), (50, 70)):
            x, y = wave(*shape, dtype=torch.float64), wave(*shape, dtype=torch.float64).flip(0 if shape else ()) * 3 + 1
            spec, alone = TensorSpec.of(x), Encoder([stage])
            assert not stage.side_spec(spec), f"{stage} claims to commute with the sum, but has side values"
            (a, _, decode), (b, _, decode_b) = next(chain.steps(alone, x)), next(chain.steps(alone, y, clients[1]))
            assert torch.allclose(decode(a + b), decode(a) + decode_b(b), rtol=1e-9, atol=1e-9), (
                f"{stage} does not commute with the sum"
            )
    for x in (wave(1001), wave(50, 70), wave(50, 70, dtype=torch.float64)):
        wire, apart, total = chain.Wire(encoder, x), torch.zeros(()), torch.zeros(())
        if not wire.codec.chains["x"].summable_prefix:
            continue
        params = wire.params()
        for weight, key in zip((1, 20, 0.3), clients, strict=True):
            message = wire.encode(x.roll(key.client), key, params)
            back, summand = (wire.decode(message, key, params, stop_at_sum=stop) for stop in (False, True))
            assert chain.same(back, wire.decode_sum(summand, key, params)), f"{encoder}: decoded in two ways"
            apart, total = apart + weight * back, total + weight * summand
        once = wire.decode_sum(total, clients[0], params)
        error, norm = float((once - apart).norm()), float(apart.norm())
        assert error <= 1e-5 * norm, f"{encoder}: decoded after the sum over clients, it is off by {error / norm}"


def check_state(encoder: Encoder, bound: Bound | None) -> None:
    """An adaptive stage's next state depends on the state and on the reports of one, two or three clients only.

    Params have the same shapes and dtypes in every round, and are never written to. Messages of every round have errors
    within the bound.
    """
    wire, agreed = chain.Wire(encoder, wave(10, 20)), None
    if not wire.adaptation.parts:
        return
    state = wire.adaptation.initial_state()
    for clients in (1, 2, 3, 1):
        params, reports, before = wire.params(state), [], copy.deepcopy(state)
        found = schema_of(params)
        agreed = agreed or found
        assert found == agreed, f"{encoder}: params change from {agreed} to {found}"
        sent = copy.deepcopy(params)
        for client in range(clients):
            key = KEY._replace(round=clients, client=client)
            x = wave(10, 20) * (client - 1) - 0.01
            back, report = wire.report(x, key, params)
            reports.append(report)
            error, allowed = float((back.double() - x.double()).abs().max()), bound(x) if bound else math.inf
            assert error <= (0 if chain.lossless(encoder) else allowed), (
                f"{encoder}: an error of {error} once it has learnt"
            )
        assert chain.all_same(params, sent), f"{encoder}: encode or decode writes to params"
        after, again = (wire.next_state(state, reports) for _ in range(2))
        assert chain.all_same(state, before), f"{encoder}: update_state writes to the state"
        assert chain.all_same(after, again), f"{encoder}: update_state gives another state the second time"
        state = after


def _round_trip(encoder: Encoder, bound: Bound | None, name: str, x: Tensor) -> None:
    try:
        y = chain.send(encoder, x)
    except EncodeError:
        if bound is not None and x.numel() and math.isnan(bound(x)):
            return
        # a stage may refuse other tensors only if the sum of squares overflows its working dtype
        limit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).max
        assert x.numel(), f"{name} is refused"
        assert float(x.double().abs().max()) >= math.sqrt(limit / x.numel()), f"{name} is refused"
        return
    assert y.shape == x.shape, f"{name}: {tuple(x.shape)} comes back as {tuple(y.shape)}"
    assert y.dtype == x.dtype, f"{name}: {x.dtype} comes back as {y.dtype}"
    if bound is not None and x.numel():
        error = float((x.double() - y.double()).abs().max())
        assert not error > bound(x), f"{name}: an error of {error}, at most {bound(x)} is allowed"


def _global_random_states() -> tuple[object, ...]:
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state(legacy=False)), random.getstate()
