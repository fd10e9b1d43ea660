"""What the value of a setting may be: its kind, its size, its range or its words."""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple


class Check(NamedTuple):
    """A condition on a value, and what an error message says about it."""

    holds: Callable[[Any], bool]
    says: str


# Conditions are written so that NaN does not meet them.
POSITIVE = Check(lambda value: value > 0, "it must be positive")
NOT_NEGATIVE = Check(lambda value: value >= 0, "it must not be negative")
RATE = Check(lambda value: 0 <= value < 1, "it must lie in [0, 1)")
SHARE = Check(lambda value: 0 <= value <= 1, "it must lie in [0, 1]")
# The number of parts that are made one by one.
COUNT = Check(lambda value: 0 < value <= 1000, "it must be positive, and at most 1000")


def one_of(*words: str) -> Check:
    """The value is one of some words."""
    listed = ", ".join(word or "''" for word in words)
    return Check(lambda value: value in words, f"it must be one of {listed}")


def checked(value: Any, kind: type, check: Check | None = None) -> Any:
    """Makes sure that a setting can have a value.

    Whole numbers have 32 bits on the devices, and other numbers are float32 there. A number beyond
    that would silently become another one.

    Args:
      value: the value.
      kind: `bool`, `int`, `float`, `str` or `tuple`; a tuple is one of whole numbers. Values of
        another kind are not looked at.
      check: what else must hold.

    Returns:
      The value as a `kind`: a whole number becomes a float, a list becomes a tuple.

    Raises:
      ValueError: the value is of another kind, too large or not allowed. The message can follow
        the name of the setting: "is 'ten'; it must be a whole number".
    """
    problem = None
    if kind is bool:
        problem = None if isinstance(value, bool) else "it must be True or False"
    elif kind is int:
        problem = _whole_number(value)
        value = value if problem else int(value)
    elif kind is float:
        problem = _number(value)
        value = value if problem else float(value)
    elif kind is str:
        problem = None if isinstance(value, str) else "it must be a text"
    elif kind is tuple:
        if not isinstance(value, tuple | list) or any(map(_whole_number, value)):
            problem = "it must be whole numbers, for example (12, 50)"
        else:
            value = tuple(map(int, value))
    if problem is None and check is not None and not check.holds(value):
        problem = check.says
    if problem is not None:
        raise ValueError(f"is {_shortened(value)}; {problem}")
    return value


def _whole_number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return "it must be a whole number"
    return None if abs(int(value)) < 2**32 else "it must be less than 2^32 = 4294967296"


def _number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return "it must be a number"
    try:
        size = abs(float(value))
    except OverflowError:  # a whole number of Python
        size = math.inf
    if size > 3.4e38:
        return "it must be a number that float32 holds, at most 3.4e38"
    if 0 < size < 1.2e-38:
        return "it must be 0, or at least 1.2e-38, the smallest number of float32"
    return None


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
