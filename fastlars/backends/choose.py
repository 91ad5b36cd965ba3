"""Which back end serves which tensors, and why."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends import cuda
from fastlars.backends.base import Backend
from fastlars.backends.cpu import DTYPES, STATE_DTYPES, Cpu
from fastlars.backends.reference import Reference

NAMES = ("cpu", "cuda", "triton", "reference")
# type of device: the compiled back ends that may serve it, the fastest first
COMPILED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@cache
def instance(name: str) -> Backend:
    """The back end of that name."""
    if name == "triton":
        # Importing Triton takes a while, and only GPUs need it.
        from fastlars.backends.triton.backend import Triton

        return Triton()
    backends: dict[str, type[Cpu] | type[cuda.Cuda] | type[Reference]] = {
        "cpu": Cpu,
        "cuda": cuda.Cuda,
        "reference": Reference,
    }
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


@cache
def why_no_triton(device: torch.device) -> str:
    """Why the Triton back end cannot serve a device; empty where it can."""
    try:
        from fastlars.backends.triton.probe import why_not
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return why_not(device)


def _why_not(name: str, weight: Tensor, grad_dtype: torch.dtype, state_dtype: torch.dtype) -> str:
    """Why the back end of that name cannot serve a weight; empty where it can."""
    for what, dtype in (("weights", weight.dtype), ("gradients", grad_dtype)):
        if dtype not in DTYPES:
            return f"compiled back ends have no {dtype} {what}"
    if state_dtype not in STATE_DTYPES:
        return f"compiled back ends have no {state_dtype} states"
    if not is_dense(weight):
        return "compiled back ends need weights without gaps in memory"
    if name == "triton":
        return why_no_triton(weight.device)
    if name == "cuda":
        return cuda.why_not(weight.device)
    if weight.device.type != name:
        return f"the {name} back end does not serve {weight.device.type}"
    return ""


def refusals(
    weight: Tensor, grad_dtype: torch.dtype, state_dtype: torch.dtype
) -> tuple[str | None, dict[str, str]]:
    """The compiled back end that serves a weight, if one does, and why none before it does."""
    reasons: dict[str, str] = {}
    for name in COMPILED.get(weight.device.type, ("triton",)):
        reason = _why_not(name, weight, grad_dtype, state_dtype)
        if not reason:
            return name, reasons
        reasons[name] = reason
    return None, reasons


def choose(weight: Tensor, grad_dtype: torch.dtype, state_dtype: torch.dtype) -> Backend:
    """The fastest back end that serves a weight.

    Raises:
        RuntimeError: FASTLARS_BACKEND demands one that does not.
    """
    name = forced()
    if name == "reference":
        return instance(name)
    if name is not None:
        reason = _why_not(name, weight, grad_dtype, state_dtype)
        if reason:
            raise RuntimeError(f"FASTLARS_BACKEND={name}, but {reason}")
        return instance(name)
    name, reasons = refusals(weight, grad_dtype, state_dtype)
    device = weight.device.type
    if name is None and device != "cpu":
        _warn_once(device, "plain torch operations", told(reasons))
    elif "cuda" in reasons and _C.build_info()["cuda"]:
        _warn_once(device, "Triton", f"its CUDA kernels cannot run here ({reasons['cuda']})")
    return instance(name or "reference")


def told(reasons: dict[str, str]) -> str:
    """Reasons in one line, each once."""
    return "; ".join(dict.fromkeys(reasons.values()))


@cache
def _warn_once(device_type: str, means: str, reason: str) -> None:
    warnings.warn(
        f"fastlars steps {device_type} parameters with {means}: {reason}. "
        "`python -m fastlars` says more.",
        stacklevel=2,
    )
