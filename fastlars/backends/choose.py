"""Which back end serves which tensors, and why."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from fastlars.backends.base import Backend
from fastlars.backends.cpu import DTYPES, STATE_DTYPES, Cpu
from fastlars.backends.reference import Reference

NAMES = ("cpu", "reference")


@cache
def instance(name: str) -> Backend:
    """The back end of that name."""
    backends: dict[str, type[Cpu] | type[Reference]] = {"cpu": Cpu, "reference": Reference}
    return backends[name]()


def forced() -> str | None:
    """The back end that FASTLARS_BACKEND demands, if it demands one."""
    name = os.environ.get("FASTLARS_BACKEND", "") or None
    if name is not None and name not in NAMES:
        raise ValueError(f"FASTLARS_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return True
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def why_not_compiled(weight: Tensor, grad_dtype: torch.dtype, state_dtype: torch.dtype) -> str:
    """Why the compiled back ends cannot serve a weight; empty where one can."""
    if weight.device.type != "cpu":
        return f"no compiled back end serves {weight.device.type}"
    for what, dtype in (("weights", weight.dtype), ("gradients", grad_dtype)):
        if dtype not in DTYPES:
            return f"the cpu back end has no {dtype} {what}"
    if state_dtype not in STATE_DTYPES:
        return f"the cpu back end has no {state_dtype} states"
    if not is_dense(weight):
        return "the cpu back end needs weights without gaps in memory"
    return ""


def choose(weight: Tensor, grad_dtype: torch.dtype, state_dtype: torch.dtype) -> Backend:
    """The fastest back end that serves a weight.

    Raises:
        RuntimeError: FASTLARS_BACKEND demands one that does not.
    """
    reason = why_not_compiled(weight, grad_dtype, state_dtype)
    name = forced()
    if name == "cpu" and reason:
        raise RuntimeError(f"FASTLARS_BACKEND=cpu, but {reason}")
    if reason and name is None and weight.device.type != "cpu":
        _warn_once(weight.device.type, reason)
    return instance(name or ("reference" if reason else "cpu"))


@cache
def _warn_once(device_type: str, reason: str) -> None:
    warnings.warn(
        f"fastlars steps {device_type} parameters with plain torch operations: {reason}. "
        "`python -m fastlars` says more.",
        stacklevel=2,
    )
