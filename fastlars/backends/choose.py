"""Chooses the back end of each parameter, and explains the choice."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends import cuda, selfcheck
from fastlars.backends.base import Backend, Dtypes, is_dense
from fastlars.backends.cpu import DTYPES, STATE_DTYPES, Cpu
from fastlars.backends.float64 import has_float64
from fastlars.backends.reference import Reference
from fastlars.rules import GradientNorm, Rule

NAMES = ("cpu", "cuda", "triton", "reference")
# type of device: the compiled back ends that can serve it, fastest first
COMPILED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
COMPILED_ELSEWHERE = ("triton",)  # on any other type of device


@cache
def instance(name: str) -> Backend:
    """The back end of this name; one for the whole process."""
    if name == "triton":
        # Imported only when needed: it is slow, and CPUs do not need it.
        from fastlars.backends.triton.backend import Triton

        return Triton()
    backends: dict[str, type[Cpu] | type[cuda.Cuda] | type[Reference]] = {
        "cpu": Cpu,
        "cuda": cuda.Cuda,
        "reference": Reference,
    }
    return backends[name]()


def demanded_backend() -> str | None:
    """The back end that FASTLARS_BACKEND demands; None if it is not set."""
    name = os.environ.get("FASTLARS_BACKEND", "") or None
    if name is not None and name not in NAMES:
        raise ValueError(f"FASTLARS_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@cache
def why_no_triton(device_type: str) -> str:
    """Why the Triton back end cannot serve a type of device; empty if it can."""
    try:
        from fastlars.backends.triton.launch import is_interpreted
    except ImportError as error:
        return (
            f"Triton cannot be imported ({error}): torch's builds for CUDA, ROCm and XPU bring it, "
            "CPUs need none, and for other builds there is pip install 'fastlars[triton]'"
        )
    if device_type == "cpu" and not is_interpreted():
        return "Triton serves cpu in its interpreter alone (TRITON_INTERPRET=1)"
    return ""


def why_no_kernels(dtypes: Dtypes) -> str:
    """Why compiled back ends have no kernels for these types; empty if they have."""
    for what, dtype in (("weights", dtypes.copy or dtypes.weight), ("gradients", dtypes.grad)):
        if dtype not in DTYPES:
            return f"compiled back ends have no {dtype} {what}"
    if dtypes.state not in STATE_DTYPES:
        return f"compiled back ends have no {dtypes.state} states"
    return ""


def why_not(name: str, weight: Tensor, dtypes: Dtypes) -> str:
    """Why a compiled back end has no kernels for a weight and these types; empty if it has."""
    if reason := why_no_kernels(dtypes):
        return reason
    if not is_dense(weight):
        return "compiled back ends need weights without gaps in memory"
    if name == "triton":
        if reason := why_no_triton(weight.device.type):
            return reason
        # Found here and not by the check against the reference, which can be switched off.
        if not has_float64(weight.device):
            return f"the {name} back end needs float64, which {weight.device} does not have"
        return ""
    if name == "cuda":
        return cuda.why_not(weight.device)
    if weight.device.type != name:
        return f"the {name} back end does not serve {weight.device.type}"
    return ""


def find_compiled(
    weight: Tensor, dtypes: Dtypes, rule: Rule | GradientNorm | None = None, rounds: bool = False
) -> tuple[str | None, dict[str, str]]:
    """The fastest compiled back end that can serve a weight, or None; and for each faster one, why
    it cannot. The arguments are those of ``choose``."""
    demanded = demanded_backend()
    able = COMPILED.get(weight.device.type, COMPILED_ELSEWHERE)
    names = able if demanded is None else (demanded,)
    reasons: dict[str, str] = {}
    for name in names:
        reason = why_not(name, weight, dtypes)
        if not reason and rule is not None:
            reason = selfcheck.why_not(instance(name), weight.device, rule, dtypes, rounds)
        if not reason:
            return name, reasons
        reasons[name] = reason
    return None, reasons


def choose(
    weight: Tensor, dtypes: Dtypes, rule: Rule | GradientNorm | None = None, rounds: bool = False
) -> Backend:
    """The fastest back end that serves a weight and agrees with the reference.

    Warns, once for each reason, if a slower back end serves a GPU than was expected.

    Args:
        weight: the parameter; the choice depends on its device and strides.
        dtypes: types of the list in which it is stepped.
        rule: the rule of the step; None skips the check against the reference.
        rounds: whether the step rounds stochastically.

    Raises:
        RuntimeError: FASTLARS_BACKEND demands a back end that cannot serve the weight.
        ValueError: FASTLARS_BACKEND, FASTLARS_CUDA_PATH or FASTLARS_CHECK is misspelt.
    """
    # Called for their errors: a misspelt variable is reported even on devices that do not read it.
    cuda.demanded_path()
    selfcheck.is_on()
    demanded, device = demanded_backend(), weight.device.type
    if demanded == "reference":
        return instance(demanded)
    name, reasons = find_compiled(weight, dtypes, rule, rounds)
    if demanded is not None and name is None:
        raise RuntimeError(f"FASTLARS_BACKEND={demanded}, but {reasons[demanded]}")
    if name is None:
        # On a CPU, the reference is the expected choice for float64 and for weights with gaps. A
        # back end that has kernels for the weight and still does not serve it failed its check.
        if device != "cpu" or any(not why_not(failed, weight, dtypes) for failed in reasons):
            _warn_once(device, "plain torch operations", format_reasons(reasons))
    elif "cuda" in reasons and _C.build_info()["cuda"]:
        _warn_once(device, "Triton", f"its CUDA kernels do not serve here ({reasons['cuda']})")
    return instance(name or "reference")


class ChoiceCache:
    """``choose``, called once for all weights with the same device, types and density."""

    def __init__(self, rule: Rule | GradientNorm, rounds: bool = False) -> None:
        self._rule = rule
        self._rounds = rounds
        self._chosen: dict[tuple[torch.device, Dtypes, bool], Backend] = {}

    def __call__(self, weight: Tensor, dtypes: Dtypes) -> Backend:
        key = weight.device, dtypes, is_dense(weight)
        if key not in self._chosen:
            self._chosen[key] = choose(weight, dtypes, self._rule, self._rounds)
        return self._chosen[key]


def format_reasons(reasons: dict[str, str]) -> str:
    """The reasons in one line, without duplicates."""
    return "; ".join(dict.fromkeys(reasons.values()))


@cache
def _warn_once(device_type: str, used: str, reason: str) -> None:
    warnings.warn(
        f"fastlars steps {device_type} parameters with {used}: {reason}. "
        "`python -m fastlars` says more.",
        stacklevel=2,
    )
