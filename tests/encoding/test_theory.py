"""Compares rates and distortions in real bytes with theory and with the papers' numbers.

Unless a test says otherwise, the source is a quarter of a million normal numbers of variance 1. The rate counts the
whole payload, with side values and tables.
"""

import math
from functools import cache, partial

import pytest

from experiments.rate_distortion.bench import measure, synthetic
from fedq.encoding import (
    ANS,
    Eden,
    Encoder,
    FixedWidth,
    HadamardRotation,
    LloydMax,
    RandomMask,
    ScaledSign,
    StateDictEncoder,
    StepQuantization,
    UniformQuantization,
)


@cache
def draw(source, i):
    return synthetic(source)(i)[:256]


def of(source, clients, *stages, coder=None):
    return measure("", StateDictEncoder(Encoder(stages, coder or FixedWidth())), source, partial(draw, source), clients)


@pytest.mark.parametrize(("bits", "nmse"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max(bits, nmse):  # Max 1960, table I
    result = of("normal", 1, LloydMax(bits))
    assert result.nmse == pytest.approx(nmse, rel=0.006)
    assert bits < result.bits < bits + 1e-3


def test_signs_with_the_best_scale():
    result = of("normal", 1, ScaledSign())
    assert result.nmse == pytest.approx(1 - 2 / math.pi, rel=0.004)
    assert 1 < result.bits < 1 + 1e-3
    # a Laplace source of variance 1 has E|x| = 1/√2
    assert of("laplace", 1, ScaledSign()).nmse == pytest.approx(0.5, rel=0.006)


@pytest.mark.parametrize("source", ["normal", "student"])
@pytest.mark.parametrize(
    ("bits", "error"), [(1, math.pi / 2 - 1), (2, 1 / (1 - 0.1175) - 1), (4, 1 / (1 - 0.009497) - 1)]
)
def test_eden_is_unbiased_behind_a_rotation_whatever_the_source(bits, error, source):  # Vargaftik 2021 and 2022
    result = of(source, 10, HadamardRotation(shared=False, repeats=2), Eden(bits))
    assert result.nmse == pytest.approx(error, rel=0.02)
    assert result.nmse_of_mean == pytest.approx(error / 10, rel=0.03)
    assert bits < result.bits < bits + 0.04


def test_half_a_bit():
    result = of("normal", 10, HadamardRotation(shared=False), RandomMask(0.5), Eden(1))
    # the kept half of the energy has the error of one bit, and the mask multiplies by two
    error = 2 * math.pi / 2 - 1
    assert result.nmse == pytest.approx(error, rel=0.02)
    assert result.nmse_of_mean == pytest.approx(error / 10, rel=0.03)
    assert 0.5 < result.bits < 0.52


@pytest.mark.parametrize(("rounding", "share"), [("stochastic", 6), ("nearest", 12), ("dithered", 12)])
@pytest.mark.parametrize("source", ["normal", "laplace"])
def test_a_step_squared_by_six_or_twelve(rounding, share, source):
    x = draw(source, 1)
    step = float(x.max() - x.min()) / 1023
    result = of(source, 4, UniformQuantization(10, rounding))
    assert result.nmse * float(x.double().square().mean()) == pytest.approx(step**2 / share, rel=0.01)
    gain = 1 if rounding == "nearest" else 4
    assert result.nmse_of_mean == pytest.approx(result.nmse / gain, rel=0.02)


def test_what_the_zeros_of_a_sparse_source_cost():
    # one element in twenty is not zero, so the rate is the entropy of the mask plus a normal source at high rate
    step = 0.05
    result = of("sparse", 1, StepQuantization(step, relative=False), coder=ANS())
    mask = -(0.05 * math.log2(0.05) + 0.95 * math.log2(0.95))
    values = 0.5 * math.log2(2 * math.pi * math.e * 20) - math.log2(step)
    assert result.bits == pytest.approx(mask + 0.05 * values, rel=0.01)
    assert result.nmse == pytest.approx(0.05 * step**2 / 12, rel=0.02)
