"""Checks of constructors' arguments, and that every stage and coder makes them."""

import dataclasses
import inspect
import math
from typing import Literal, get_type_hints

import numpy as np
import pytest

import fedq.encoding
from fedq.encoding import Coder, EncodingStage
from fedq.encoding.stage import AdaptiveEncodingStage
from fedq.errors import check_choice, check_range

EXPORTED = [getattr(fedq.encoding, name) for name in fedq.encoding.__all__]
PARTS = [
    part
    for part in EXPORTED
    if inspect.isclass(part)
    and issubclass(part, EncodingStage | AdaptiveEncodingStage | Coder)
    and dataclasses.is_dataclass(part)
]
REQUIRED = {"step": 1.0, "limit": 1.0}
FIELDS = [(part, field) for part in PARTS for field in dataclasses.fields(part)]
INTEGERS = [(part, f) for part, f in FIELDS if get_type_hints(part)[f.name] in (int, int | None)]
FLOATS = [(part, f) for part, f in FIELDS if get_type_hints(part)[f.name] in (float, float | None)]


def make(part: type, field: dataclasses.Field, value: object) -> object:
    given = {f.name: REQUIRED[f.name] for f in dataclasses.fields(part) if f.name in REQUIRED}
    return part(**(given | {field.name: value}))


def name(value: object) -> str:
    return getattr(value, "__name__", getattr(value, "name", ""))


@pytest.mark.parametrize(("part", "field"), INTEGERS, ids=name)
@pytest.mark.parametrize("value", [1.5, 2.0, True, "3"], ids=repr)
def test_an_integer_is_asked_for_at_construction(part: type, field: dataclasses.Field, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field.name} must be (an integer|4, 8).*, not "):
        make(part, field, value)


@pytest.mark.parametrize(("part", "field"), FLOATS, ids=name)
@pytest.mark.parametrize("value", [math.nan, math.inf, "3", True], ids=repr)
def test_a_finite_number_is_asked_for_at_construction(part: type, field: dataclasses.Field, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field.name} must be a finite number.*, not "):
        make(part, field, value)


def test_there_are_such_arguments() -> None:
    assert len(INTEGERS) > 20
    assert len(FLOATS) > 15


@pytest.mark.parametrize(
    ("value", "limits", "sentence"),
    [
        (17, {"low": 1, "high": 16, "integer": True}, "x must be from 1 to 16, not 17"),
        (1.5, {"low": 1, "high": 16, "integer": True}, "x must be an integer, from 1 to 16, not 1.5"),
        (0, {"low": 1}, "x must be at least 1, not 0"),
        (0.0, {"above": 0}, "x must be above 0, not 0.0"),
        (2, {"above": 0, "high": 1}, "x must be above 0 and at most 1, not 2"),
        (2, {"low": 1, "below": 2}, "x must be at least 1 and below 2, not 2"),
        (None, {"low": 1}, "x must be a finite number, at least 1, not None"),
        ("a", {"integer": True, "optional": True}, "x must be an integer, not 'a'"),
    ],
)
def test_sentences(value: object, limits: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        check_range("x", value, **limits)
    assert str(raised.value) == sentence


def test_what_is_within_the_limits_is_taken() -> None:
    check_range("x", 1, 1, 16, integer=True)
    check_range("x", np.int64(16), 1, 16, integer=True)
    check_range("x", np.float32(0.5), above=0, below=1)
    check_range("x", 10**400, 1, integer=True)
    check_range("x", None, 1, optional=True)


def test_choices() -> None:
    check_choice("x", "a", Literal["a", "b"])
    with pytest.raises(ValueError, match="x must be a, b or c, not 'd'"):
        check_choice("x", "d", Literal["a", "b", "c"])
    with pytest.raises(ValueError, match="x must be 4 or 8, not 4.0"):
        check_choice("x", 4.0, Literal[4, 8])
    with pytest.raises(ValueError, match="x must be 4 or 8, not \\[4\\]"):
        check_choice("x", [4], Literal[4, 8])
