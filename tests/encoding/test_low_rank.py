"""Compares PowerSGD with numpy's singular value decomposition, and random subspaces with exact projections."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import (
    Encoder,
    EncodingStage,
    FixedWidth,
    Key,
    MessageError,
    PowerSGD,
    RandomSubspace,
    StateDictEncoder,
    TensorSpec,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.message import OVERHEAD
from fedq.encoding.stage import AdaptiveEncodingStage
from fedq.encoding.testing import Bound, reframe, wave

STAGES: list[tuple[EncodingStage | AdaptiveEncodingStage, Bound | None]] = [
    (PowerSGD(1), None),
    (PowerSGD(4), None),
    (RandomSubspace(1), None),
    (RandomSubspace(2), None),
    (RandomSubspace(2, scale=False), None),
    (RandomSubspace(32), None),
]
KEY = Key(3, 1, 4)


def matrix(rows: int, columns: int, spectrum: np.ndarray) -> Tensor:
    """Returns a float64 matrix with these singular values."""
    generator = Key(0).generator()
    left, _ = np.linalg.qr(generator.normal(size=(rows, len(spectrum))))
    right, _ = np.linalg.qr(generator.normal(size=(columns, len(spectrum))))
    return torch.from_numpy(left * spectrum @ right.T)


def step(stage: PowerSGD, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the decoded tensor and the next state of a round with one client."""
    y, side, report = stage.encode(x, KEY, stage.params(state))
    return stage.decode(y, side, TensorSpec.of(x), KEY, stage.params(state)), stage.update_state(state, report)


def send(stage: EncodingStage, x: Tensor, key: Key = KEY) -> Tensor:
    return stage.decode(*stage.encode(x, key), TensorSpec.of(x), key)


# ------------------------------------------------------------------------------------------------ PowerSGD


@pytest.mark.parametrize("scale", [1.0, 1e37, 1e-36, 1e-40])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 10, 9), (4, 10, 90)])
def test_a_matrix_of_the_rank_is_exact(shape: tuple[int, ...], scale: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
        more = {1e37: 1e307, 1e-36: 1e-306, 1e-40: 1e-310}.get(scale, scale) if dtype == torch.float64 else scale
        for rank in (1, 3) if scale > 1e-40 or dtype != torch.bfloat16 else ():
            x = matrix(40, 90, np.array([3.0, 2.0, 0.5][:rank])) * more
            x = (x.t() if shape[0] == 90 else x.reshape(shape)).to(dtype)
            back, _ = step(PowerSGD(3), x, PowerSGD(3).initial_state(TensorSpec.of(x)))
            error = ((back.double() - x.double()) / more).norm() / (x.double() / more).norm()
            # denormals have few digits
            assert float(error) < (tolerance if scale > 1e-40 else 0.01), (dtype, rank)


@pytest.mark.parametrize(("rows", "columns"), [(30, 50), (50, 30)])
def test_what_is_decoded_is_the_projection(rows: int, columns: int) -> None:
    x, stage = matrix(rows, columns, np.linspace(1, 2, 30)), PowerSGD(4)
    state = stage.initial_state(TensorSpec.of(x))
    m = x.numpy() if rows > columns else x.numpy().T  # more rows than columns, as in the paper
    p, _ = np.linalg.qr(m @ state["basis"].double().numpy().T)
    expected = p @ p.T @ m
    back, after = step(stage, x, state)
    np.testing.assert_allclose(back.numpy() if rows > columns else back.numpy().T, expected, atol=1e-13)
    q, _ = np.linalg.qr(m.T @ p)
    basis = after["basis"].double().numpy()
    np.testing.assert_allclose(basis.T @ basis, q @ q.T, atol=2e-3)  # float16
    assert after["basis"].shape == (4, 30)


def test_the_error_falls_to_the_truncated_decompositions() -> None:
    spectrum = 1 / np.arange(1, 41)
    x, stage = matrix(40, 100, spectrum), PowerSGD(3)
    best = math.sqrt((spectrum[3:] ** 2).sum())
    state, errors = stage.initial_state(TensorSpec.of(x)), []
    for _ in range(12):
        back, state = step(stage, x, state)
        errors.append(float((back - x).norm()))
    assert errors[0] > 1.15 * best
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors)), errors
    assert best - 1e-12 <= errors[-1] < 1.001 * best
    *_, right = np.linalg.svd(x.numpy().T)
    basis = state["basis"].double().numpy()
    np.testing.assert_allclose(basis.T @ basis, right[:3].T @ right[:3], atol=0.05)


def test_the_next_basis_is_of_the_cohorts_sum_whatever_a_clients_scale() -> None:
    a, b = matrix(20, 30, np.array([1.0])), matrix(20, 30, np.ones(2)).flip(0, 1)
    stage = PowerSGD(2)
    codec = StateDictEncoder(rules={"x": Encoder([stage])}).bind(schema_of({"x": a}), reports=True)
    adaptation, state = codec.adaptation, codec.adaptation.initial_state()
    params, total, expected = adaptation.params(state), None, np.zeros((20, 2))
    start = state["x/0/basis"].double().numpy()
    for client, x in enumerate((a, 1000 * b, a)):
        key = KEY._replace(client=client)
        message = codec.encode({"x": x}, key, params).message
        assert len(message) == OVERHEAD + 2 * 2 * 20 + 8 * 2 * (20 + 30)
        _, report = codec.decode(message, key, params)
        total = report if total is None else adaptation.combine(total, report)
        p, r = np.linalg.qr(x.numpy().T @ start.T)
        s = x.numpy() @ (p * np.sign(np.diag(r)))
        expected += s / np.abs(s).max()
    assert total is not None
    np.testing.assert_allclose(total["x/0/basis"].numpy().T, expected, atol=5e-3)
    after = adaptation.update_state(state, total)["x/0/basis"].double().numpy()
    q, _ = np.linalg.qr(expected)
    np.testing.assert_allclose(after.T @ after, q @ q.T, atol=5e-3)
    np.testing.assert_allclose(after @ after.T, np.eye(2), atol=2e-3)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_sum_without_a_direction_leaves_the_basis(value: float) -> None:
    # all updates are zero, or a report overflows float16
    stage = PowerSGD(2)
    state = stage.initial_state(TensorSpec((20, 30), torch.float32))
    aggregated = {"basis": torch.ones(2, 20, dtype=torch.float16)}
    assert not torch.equal(stage.update_state(state, aggregated)["basis"], state["basis"])
    aggregated["basis"][:] = 0
    aggregated["basis"][0, 3] = value
    assert stage.update_state(state, aggregated) == state


def test_the_views_and_their_bytes() -> None:
    views = {(64, 32, 5, 5): (64, 800), (10, 512): (10, 512), (6, 7, 8, 9): (42, 72), (100, 1, 100): (100, 100)}
    for shape, (rows, columns) in views.items():
        assert PowerSGD(4).encoded_spec(TensorSpec(shape, torch.float32), {}).shape == (4 * (rows + columns),)
        assert PowerSGD(4).initial_state(TensorSpec(shape, torch.float32))["basis"].shape == (4, rows)
        encoded = RandomSubspace(4).encoded_spec(TensorSpec(shape, torch.float32), {})
        assert encoded.shape == ((rows, 4) if columns > rows else (4, columns))
    # for the CNN's largest layer, uploads with reports are over 100 times shorter, and params are short
    spec = TensorSpec((512, 3136), torch.float32)
    up = 4 * PowerSGD().encoded_spec(spec, {}).numel + 2 * PowerSGD().update_spec(spec)["basis"].spec.numel
    assert up == 4 * 4 * 3648 + 2 * 4 * 512
    assert 4 * spec.numel / up > 100
    assert 4 * spec.numel / (4 * RandomSubspace().encoded_spec(spec, {}).numel) == 98


@pytest.mark.parametrize("stage", [PowerSGD(4), RandomSubspace(9)], ids=str)
def test_what_would_not_be_smaller_passes(stage: PowerSGD | RandomSubspace) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        for shape in ((), (0,), (3, 0), (1000,), (8, 8), (9, 7)):
            spec = TensorSpec(shape, dtype)
            assert stage.encoded_spec(spec, {}) == spec
            x, codec = (
                wave(*shape).to(dtype),
                StateDictEncoder(rules={"x": Encoder([stage])}).bind({"x": spec}, reports=True),
            )
            params = codec.adaptation.params(codec.adaptation.initial_state())
            message = codec.encode({"x": x}, KEY, params).message
            assert len(message) == OVERHEAD + x.numel() * dtype.itemsize
            assert torch.equal(codec.decode(message, KEY, params).tensors["x"], x)
    # a half-precision tensor has factors in float32, so the factors must save more
    assert stage.encoded_spec(TensorSpec((15, 15), torch.float16), {}).shape == (15, 15)
    assert stage.encoded_spec(TensorSpec((15, 15), torch.float32), {}).shape != (15, 15)


def test_a_quantiser_may_follow() -> None:
    x = matrix(100, 300, np.array([5.0, 3.0, 1.0])).float()
    stage = PowerSGD(3)
    y, _, _ = stage.encode(x, KEY, stage.initial_state(TensorSpec.of(x)))
    left, right = y.abs().split([300, 900])
    assert float(left.max()) == pytest.approx(float(right.max()), rel=1e-5)
    encoder = StateDictEncoder(Encoder([stage, UniformQuantization(8, "nearest")], FixedWidth()), 0)
    codec = encoder.bind(schema_of({"x": x}))
    params = codec.adaptation.params(codec.adaptation.initial_state())
    message = codec.encode({"x": x}, KEY, params).message
    assert len(message) == OVERHEAD + 8 + 3 * 400
    back, _ = codec.decode(message, KEY, params)
    assert float((back["x"] - x).norm() / x.norm()) < 0.05


def test_zeros_and_the_largest_values_come_back_finite() -> None:
    stage = PowerSGD(1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.zeros(20, 30, dtype=dtype)
        state = stage.initial_state(TensorSpec.of(x))
        assert torch.equal(step(stage, x, state)[0], x)
        x[:] = torch.finfo(dtype).max
        x[10:, 15:] = 0  # the best approximation of rank 1 is 1.17 times the upper left part
        for _ in range(6):
            back, state = step(stage, x, state)
        assert torch.equal(back[:10, :15], x[:10, :15])
        assert bool(back.isfinite().all())


def test_factors_that_overflow_are_refused() -> None:
    x = wave(30, 40)
    codec = StateDictEncoder(Encoder([PowerSGD(2)]), 0).bind(schema_of({"x": x}))
    params = codec.adaptation.params(codec.adaptation.initial_state())
    message = codec.encode({"x": x}, KEY, params).message
    most = np.full(2 * 70, np.finfo(np.float32).max, "<f4")
    for sign in (1, -1):
        most[:30] *= sign
        try:
            back, _ = codec.decode(reframe(message, most.tobytes()), KEY, params)
        except MessageError:
            continue
        assert bool(back["x"].isfinite().all())


# ------------------------------------------------------------------------------------------ random subspaces


def projection(stage: RandomSubspace, n: int, key: Key, wide: bool = False) -> Tensor:
    """Returns the matrix that decode(encode(·)) applies to the longer side of an n × n/2 matrix, from unit vectors."""
    columns = []
    for half in torch.eye(n, dtype=torch.float64).split(n // 2):
        columns.append(send(stage, half, key).t() if wide else send(stage, half.t(), key))
    return torch.cat(columns, 1)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 7])
def test_without_scale_it_is_an_orthogonal_projection(rank: int, wide: bool) -> None:
    p = projection(RandomSubspace(rank, scale=False), 40, KEY, wide)
    torch.testing.assert_close(p, p.t(), rtol=0, atol=1e-15)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-15)
    assert round(float(p.trace()), 9) == int(torch.linalg.matrix_rank(p)) == rank
    sizes = (p != 0).sum(1)  # the size of the group of each row
    assert int(sizes.max()) - int(sizes.min()) == (40 % rank > 0)
    # `scale` multiplies each row by the size of its group
    torch.testing.assert_close(projection(RandomSubspace(rank), 40, KEY, wide), p * sizes[:, None])


def test_errors_are_as_told() -> None:
    n, rank, keys = 40, 5, 300
    x = matrix(n, 10, np.ones(10))
    for stage, expected in ((RandomSubspace(rank), n / rank - 1), (RandomSubspace(rank, False), 1 - rank / n)):
        errors = [float((send(stage, x, Key(i)) - x).square().sum() / x.square().sum()) for i in range(keys)]
        assert abs(np.mean(errors) - expected) < 4 * np.std(errors) / math.sqrt(keys), stage
    assert not RandomSubspace(scale=False).unbiased


@pytest.mark.parametrize("shape", [(16, 5), (5, 16)])
def test_unbiased_element_by_element(shape: tuple[int, int]) -> None:
    x, draws = wave(*shape, dtype=torch.float64), 1500
    decoded = torch.stack([send(RandomSubspace(3), x, Key(1, i)) for i in range(draws)])
    error, standard = (decoded.mean(0) - x).abs(), decoded.std(0) / math.sqrt(draws)
    assert bool((error <= 4 * standard).all()), float((error / standard).max())
    assert bool((standard > 0).all())


def test_what_lies_in_the_subspace_comes_back() -> None:
    stage = RandomSubspace(6, scale=False)
    for shape, tolerance in (((60, 3, 9), 1e-6), ((30, 70), 1e-6)):
        inside = send(stage, wave(*shape))
        torch.testing.assert_close(send(stage, inside), inside, rtol=0, atol=tolerance)
        assert int(torch.linalg.matrix_rank(inside.reshape(shape[0], -1))) == 6
        assert float((inside - wave(*shape)).norm() / wave(*shape).norm()) > 0.5


def test_all_clients_of_a_round_share_it() -> None:
    x = wave(50, 20)
    sent = [RandomSubspace().encode(x, key)[0] for key in (KEY, KEY._replace(client=9), KEY._replace(round=2))]
    assert torch.equal(sent[0], sent[1])
    assert not torch.equal(sent[0], sent[2])


def test_large_values_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.full((40, 30), torch.finfo(dtype).max / 2, dtype=dtype)
        for stage in (RandomSubspace(2), RandomSubspace(2, scale=False)):
            back = send(stage, x)
            assert back.dtype == dtype
            assert bool(back.isfinite().all())


@pytest.mark.parametrize("stage", [PowerSGD, RandomSubspace])
def test_refusals(stage: type[PowerSGD] | type[RandomSubspace]) -> None:
    for rank in (0, -3):
        with pytest.raises(ValueError, match=f"rank must be at least 1, not {rank}"):
            stage(rank)
    with pytest.raises(ValueError, match=f"{stage.__name__} takes floating tensors of 16 to 64 bits, not torch.int64"):
        stage().encoded_spec(TensorSpec((50, 50), torch.int64), {})
