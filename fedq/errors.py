"""The base class of all errors that a user can fix, and checks of constructors' arguments."""

import math
from numbers import Integral, Real
from typing import Any, get_args


class FedqError(Exception):
    """The text is one clear sentence: the fault, its place, and a remedy.

    Programs show the text without a traceback.
    """


class MissingPackage(FedqError, ImportError):
    """A package is missing; the text names the extra that installs it."""


def check_range(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Raises ValueError unless `value` is a finite number within the limits.

    name: name of the argument, for the error's text.
    low: the smallest value allowed.
    high: the largest value allowed.
    above: a lower limit that is not allowed itself.
    below: an upper limit that is not allowed itself.
    integer: Whether only integers are allowed. True and False do not count as integers.
    optional: Whether None is allowed.
    """
    if optional and value is None:
        return
    number = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    number = number and -math.inf < value < math.inf
    if (
        number
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    ):
        return
    limits = {"at least": low, "above": above, "at most": high, "below": below}
    text = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
    if low is not None and high is not None:
        text = f"from {low} to {high}"
    kind = "" if number else "an integer" if integer else "a finite number"
    raise ValueError(f"{name} must be {', '.join(filter(None, (kind, text)))}, not {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless `value` is one of `choices`, a Literal type."""
    *others, last = get_args(choices)
    if (type(value), value) not in [(type(choice), choice) for choice in (*others, last)]:
        raise ValueError(f"{name} must be {', '.join(map(str, others))} or {last}, not {value!r}")
