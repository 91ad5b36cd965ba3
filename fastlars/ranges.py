"""Converts the values of options to Python's own numbers, and refuses those out of range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from decimal import Decimal
from numbers import Real
from typing import Any

# Rates that torch's schedulers bring down to 0 end, by their roundings, a little above or below.
ROUNDING = 1e-9


def unboxed(value: Any) -> Any:
    """The element of an array or tensor of one, of numpy or torch; anything else as it is."""
    boxed = hasattr(value, "item") and math.prod(value.shape) == 1
    return value.item() if boxed else value


def real(name: str, value: Any) -> float:
    """``value`` as a float: a real number of Python, numpy or torch, or an array of one element.

    A value below 0 by no more than a rounding is 0. True and False are refused.
    """
    value = unboxed(value)
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    found = float(value)
    return 0.0 if -ROUNDING < found < 0.0 else found


def pair(name: str, value: Any) -> tuple[float, float]:
    """``value``, any sequence of two numbers, as two floats."""
    try:
        if isinstance(value, (str, Mapping, Set)):
            raise TypeError
        first, second = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a pair of numbers, got {value!r}") from None
    return real(name, first), real(name, second)


def at_least_zero(name: str, value: Any) -> float:
    """``value`` as a finite float of at least 0."""
    found = real(name, value)
    if not 0.0 <= found < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return found


def up_to_one(name: str, value: Any) -> float:
    """``value`` as a float in [0, 1]."""
    found = at_least_zero(name, value)
    if found > 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return found


def above_zero(name: str, value: Any) -> float:
    """``value`` as a finite float above 0."""
    found = real(name, value)
    if not 0.0 < found < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return found


def below_one(name: str, value: Any) -> float:
    """``value`` as a float in [0, 1)."""
    found = real(name, value)
    if not 0.0 <= found < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return found


def one_of(name: str, value: Any, words: tuple[str, ...]) -> str:
    """``value``, which is one of ``words``."""
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, words))}, got {value!r}")
    return words[words.index(value)]


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool: True, False, numpy's, or 1 and 0."""
    if isinstance(value, bool):
        return value
    value = unboxed(value)
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_bounds(name: str, lower: float, upper: float) -> None:
    """Raise unless 0 <= lower <= upper, with a finite lower and an upper above 0."""
    if not (0.0 <= lower <= upper and lower < math.inf and upper > 0.0):
        raise ValueError(
            f"{name} must be (lower, upper) with 0 <= lower <= upper, lower finite and upper > 0, "
            f"got ({lower}, {upper})"
        )
