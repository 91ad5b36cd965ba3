"""Copies of options, for comparison with later values: an option may be changed in place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import is_
from types import NoneType
from typing import Any

import torch

from fastlars.ranges import unboxed

BUILTIN = frozenset({NoneType, bool, int, float, str, torch.dtype})


def consists_of(value: Any, types: Collection[type]) -> bool:
    """Whether a value has one of these types, or is a list or tuple of such values."""
    members = value if type(value) in (list, tuple) else (value,)
    return all(type(member) in types for member in members)


def comparable_copy(value: Any) -> Any:
    """A copy that consists of Python's own types.

    A value that cannot be converted gives a new object, which equals no other, so that the option
    counts as changed.
    """
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if type(value) in (list, tuple):
        return type(value)(map(comparable_copy, value))
    if hasattr(value, "tolist"):  # a number, array or tensor of numpy or torch
        element = unboxed(value)
        return comparable_copy(value.tolist()) if element is value else element
    # Configuration libraries such as OmegaConf have their own sequence types.
    return list(map(comparable_copy, value)) if isinstance(value, Sequence) else object()


def same_objects(known: Sequence[Any], current: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects, in the same order."""
    return len(known) == len(current) and all(map(is_, known, current))


def unchanged(known: Any, current: Any) -> bool:
    """Whether values equal those of which ``comparable_copy`` was taken."""
    try:
        return bool(known == current)
    except (RuntimeError, ValueError):
        return False  # ``current`` holds arrays, which compare element by element
