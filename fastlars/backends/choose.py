"""Which back end serves which tensors, and why."""

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
from fastlars.backends.reference import Reference
from fastlars.rules import GradientNorm, Rule

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


@cache
def why_no_triton(device_type: str) -> str:
    """Why the Triton back end has no kernels for a type of device; empty where it has."""
    try:
        from fastlars.backends.triton.backend import interprets
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device_type == "cpu" and not interprets():
        return "Triton serves cpu in its interpreter alone (TRITON_INTERPRET=1)"
    return ""


def why_not(name: str, weight: Tensor, dtypes: Dtypes) -> str:
    """Why the back end of that name has no kernels for a weight; empty where it has."""
    for what, dtype in (("weights", dtypes.copy or dtypes.weight), ("gradients", dtypes.grad)):
        if dtype not in DTYPES:
            return f"compiled back ends have no {dtype} {what}"
    if dtypes.state not in STATE_DTYPES:
        return f"compiled back ends have no {dtypes.state} states"
    if not is_dense(weight):
        return "compiled back ends need weights without gaps in memory"
    if name == "triton":
        return why_no_triton(weight.device.type)
    if name == "cuda":
        return cuda.why_not(weight.device)
    if weight.device.type != name:
        return f"the {name} back end does not serve {weight.device.type}"
    return ""


def refusals(
    weight: Tensor, dtypes: Dtypes, rule: Rule | GradientNorm | None = None, rounds: bool = False
) -> tuple[str | None, dict[str, str]]:
    """The compiled back end that serves a weight, if one does, and why none before it does."""
    demanded = forced()
    names = COMPILED.get(weight.device.type, ("triton",)) if demanded is None else (demanded,)
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

    Args:
        weight: the parameter; its device and its strides count.
        dtypes: types of the list that it is stepped in.
        rule: of the step; None leaves out the check against the reference.
        rounds: whether the step rounds stochastically.

    Raises:
        RuntimeError: FASTLARS_BACKEND demands one that does not.
        ValueError: FASTLARS_BACKEND, FASTLARS_CUDA_PATH or FASTLARS_CHECK is misspelt.
    """
    # These raise where a variable is misspelt, also on a device that does not need it.
    cuda.demanded_path()
    selfcheck.is_on()
    demanded, device = forced(), weight.device.type
    if demanded == "reference":
        return instance(demanded)
    name, reasons = refusals(weight, dtypes, rule, rounds)
    if demanded is not None and name is None:
        raise RuntimeError(f"FASTLARS_BACKEND={demanded}, but {reasons[demanded]}")
    if name is None:
        # On a CPU the reference is right for float64 and views with gaps: nothing to warn of.
        if device != "cpu" or any(not why_not(known, weight, dtypes) for known in reasons):
            _warn_once(device, "plain torch operations", format_reasons(reasons))
    elif "cuda" in reasons and _C.build_info()["cuda"]:
        _warn_once(device, "Triton", f"its CUDA kernels do not serve here ({reasons['cuda']})")
    return instance(name or "reference")


class Chooser:
    """:func:`choose` for the weights of one step: asked once for all that are alike."""

    def __init__(self, rule: Rule | GradientNorm, rounds: bool = False) -> None:
        self._rule = rule
        self._rounds = rounds
        self._known: dict[tuple[torch.device, Dtypes, bool], Backend] = {}

    def __call__(self, weight: Tensor, dtypes: Dtypes) -> Backend:
        alike = weight.device, dtypes, is_dense(weight)
        if alike not in self._known:
            self._known[alike] = choose(weight, dtypes, self._rule, self._rounds)
        return self._known[alike]


def format_reasons(reasons: dict[str, str]) -> str:
    """Reasons in one line, each once."""
    return "; ".join(dict.fromkeys(reasons.values()))


@cache
def _warn_once(device_type: str, means: str, reason: str) -> None:
    warnings.warn(
        f"fastlars steps {device_type} parameters with {means}: {reason}. "
        "`python -m fastlars` says more.",
        stacklevel=2,
    )
