"""Values of options, to be compared with later: they may be changed in place."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch

from fastlars.rules import unboxed


def is_builtin(value: Any) -> bool:
    """Whether a value is of Python's own types, or a list or tuple of such."""
    members = value if type(value) in (list, tuple) else (value,)
    return all(
        member is None or type(member) in (bool, int, float, str, torch.dtype) for member in members
    )


def kept(value: Any) -> Any:
    """A copy in Python's own types; what is none of them is never the same again."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if type(value) in (list, tuple):
        return type(value)(map(kept, value))
    if hasattr(value, "tolist"):  # of numpy or torch
        element = unboxed(value)
        return kept(value.tolist()) if element is value else element
    # Of a configuration library.
    return list(map(kept, value)) if isinstance(value, Sequence) else object()


def same_objects(known: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects, in the same order."""
    return len(known) == len(now) and all(map(is_, known, now))


def unchanged(known: Any, now: Any) -> bool:
    """Whether values are those that were kept."""
    try:
        return bool(known == now)
    except (RuntimeError, ValueError):
        return False  # arrays, which compare element by element
