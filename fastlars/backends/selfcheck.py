"""A back end against the reference: both step one small list, and must agree.

A back end is checked at the first use of a device, for the kernels that are about to be used; this
catches what the tests of another machine cannot: a compiler, driver or GPU under which the same
source computes something else.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fastlars import forks
from fastlars.backends.base import Backend, Dtypes, StepScalars, Tensors
from fastlars.backends.reference import Reference
from fastlars.backends.upload import is_capturing
from fastlars.rules import GradientNorm, Rule

F64 = torch.float64
# Two chunks of the CPU back end and five of the others, the last of them ragged; one whole chunk;
# less than one, off every 16-byte boundary; a single element.
SIZES = (16_401, 4_096, 257, 1)
OFF_BOUNDARY = 257
# A step's learning rate, gradient scale, and seed of stochastic rounding: the first step is one
# call, the second is `measure` and `apply`, as for sharded parameters.
STEPS = (StepScalars(0.5, 1.0, 11), StepScalars(0.25, 0.5, 12))
# Relative to a value and its tensor's root mean square. Sums in another order differ by 1e-6; where
# a type has fewer bits, a value next to the middle of two numbers goes up here and down there, in
# the weight, its copy and the states, in either step: 4 such roundings.
AGREES = {torch.float32: 1e-5, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}


@dataclass(frozen=True)
class Family:
    """Kernels that are checked together: those of a rule's options, for types of tensors.

    Attributes:
        rule: its options decide which kernels run; its numbers are those of ``rule.probe()``.
        dtypes: types of the list.
        rounds: whether bfloat16 weights are rounded stochastically.
    """

    rule: Rule | GradientNorm
    dtypes: Dtypes
    rounds: bool = False

    def __str__(self) -> str:
        return f"{self.rule.title}, {described(self.dtypes, self.rounds)}"


def described(dtypes: Dtypes, rounds: bool = False) -> str:
    """The types of a list, in words.

    Example:
        >>> described(Dtypes(torch.float32, torch.float16, torch.float32, copy=torch.float16))
        'float32 masters of float16 weights, float16 gradients, float32 states'
    """
    weight, grad, state, copy = (str(dtype).removeprefix("torch.") for dtype in astuple(dtypes))
    weights = f"{weight} weights" if dtypes.copy is None else f"{weight} masters of {copy} weights"
    rounding = ", stochastic rounding" if rounds else ""
    return f"{weights}, {grad} gradients, {state} states{rounding}"


@lru_cache(maxsize=1024)  # a schedule of momentum or weight decay makes a new rule every step
def family(rule: Rule | GradientNorm, dtypes: Dtypes, rounds: bool = False) -> Family:
    """The family of a rule under its options."""
    return Family(rule.probe(), dtypes, rounds and dtypes.weight == torch.bfloat16)


def difference(backend: Backend, family: Family, device: torch.device) -> str:
    """How the results of the back end differ from the reference's, or how it fails; empty where
    they agree. Waits for the device.

    Raises:
        OutOfMemoryError: the device has no memory left, which is no fault of the back end.
        RuntimeError: of something else that has failed on the device before.
    """
    tested = _tensors(family)
    right = _step(Reference(), family, _in_float64(tested))
    with _waiting_allowed(device):
        try:
            there = _on(tested, device)
            found = [(name, x.detach().to("cpu", F64)) for name, x in _step(backend, family, there)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever goes wrong in a compiler, a driver or a kernel: another back end serves.
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"
    types = (family.dtypes.weight, family.dtypes.state, family.dtypes.copy or torch.float32)
    # Stochastic rounding errs by up to twice as much as rounding to nearest.
    tolerance = max(AGREES[dtype] for dtype in types) * (2 if family.rounds else 1)
    for (name, ours), (_, theirs) in zip(found, right, strict=True):
        text = _compare(ours, theirs.to(F64), tolerance)
        if text:
            return f"{name} {text}"
    return ""


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """What has failed on the device before shows now; a wait is no mistake, as it may be elsewhere
    (``torch.cuda.set_sync_debug_mode``)."""
    on_cuda = device.type == "cuda" and torch.cuda.is_available()
    mode = torch.cuda.get_sync_debug_mode() if on_cuda else 0
    if mode:
        torch.cuda.set_sync_debug_mode("default")
    try:
        here = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        if here and here.type == device.type:
            torch.accelerator.synchronize(device)
        yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


def _compare(found: Tensor, right: Tensor, tolerance: float) -> str:
    allowed = tolerance * (right.abs() + right.square().mean().sqrt())
    # Not `>`: a NaN differs.
    wrong = ~((found - right).abs() <= allowed)
    if not wrong.any():
        return ""
    at = int(wrong.flatten().nonzero()[0])
    is_, should = found.flatten()[at].item(), right.flatten()[at].item()
    return (
        f"[{at}] is {is_:.6g} instead of {should:.6g} ({int(wrong.sum())} of {wrong.numel()} wrong)"
    )


def _step(backend: Backend, family: Family, tensors: Tensors) -> list[tuple[str, Tensor]]:
    """Everything that the steps give or write, by name."""
    rule = family.rule
    bound = backend.bind(tensors, backend.layout(tensors.weights))
    named = [("square norm", backend.measure(GradientNorm(), bound, StepScalars(0.0))[:, -1])]
    if isinstance(rule, GradientNorm):  # which steps nothing
        return named
    for number, each in enumerate(STEPS):
        scalars = each if family.rounds else replace(each, seed=None)
        if number == 0:
            ratios = backend.step(rule, bound, scalars)
        else:
            sums = backend.measure(rule, bound, scalars) if rule.adapt else None
            ratios = backend.apply(rule, bound, scalars, sums)
        named.append((f"trust ratio of step {number + 1}", ratios))
    lists = [("weight", tensors.weights), *zip(rule.states, tensors.states, strict=True)]
    lists += [("copy", tensors.copies or []), (str(rule.counter), tensors.counters or [])]
    named += [(f"{name} {i}", x) for name, values in lists for i, x in enumerate(values)]
    return named


def _tensors(family: Family) -> Tensors:
    """The list on the host."""
    rule, dtypes = family.rule, family.dtypes

    def waves(scale: float, pace: float, dtype: torch.dtype) -> list[Tensor]:
        # No random numbers: those of the training that is about to begin stay as they are.
        places = [torch.arange(1, n + 1, dtype=F64, device="cpu") for n in SIZES]
        return [(scale * torch.sin(pace * x)).to(dtype) for x in places]

    weights = waves(0.5, 0.7, dtypes.weight)
    start = torch.tensor(rule.NEVER_STEPPED, dtype=torch.float32, device="cpu")
    counters = None if rule.counter is None else [start.clone() for _ in weights]
    return Tensors(
        weights=weights,
        grads=waves(0.1, 1.3, dtypes.grad),
        states=tuple(waves(0.0, 0.0, dtypes.state) for _ in rule.states),
        counters=counters,
        copies=None if dtypes.copy is None else [w.to(dtypes.copy) for w in weights],
        dtypes=dtypes,
    )


def _in_float64(tensors: Tensors) -> Tensors:
    """The same values for the reference. bfloat16 states stay so: their rounding is part of the
    rule, while that of weights is within what :data:`AGREES` allows."""
    dtypes = tensors.dtypes
    state = F64 if dtypes.state == torch.float32 else dtypes.state
    copies = tensors.copies
    return Tensors(
        weights=[w.to(F64, copy=True) for w in tensors.weights],
        grads=[g.to(F64, copy=True) for g in tensors.grads],
        states=tuple([x.to(state, copy=True) for x in xs] for xs in tensors.states),
        counters=None if tensors.counters is None else [c.clone() for c in tensors.counters],
        copies=None if copies is None else [c.to(F64, copy=True) for c in copies],
        dtypes=Dtypes(F64, F64, state, None if copies is None else F64),
    )


def _on(tensors: Tensors, device: torch.device) -> Tensors:
    """The same list on a device."""

    def placed(values: list[Tensor]) -> list[Tensor]:
        moved = []
        for x in values:
            skipped = int(x.numel() == OFF_BOUNDARY)
            buffer = torch.empty(x.numel() + skipped, dtype=x.dtype, device=device)
            moved.append(buffer[skipped:].view(x.shape).copy_(x))
        return moved

    return Tensors(
        weights=placed(tensors.weights),
        grads=placed(tensors.grads),
        states=tuple(map(placed, tensors.states)),
        counters=None if tensors.counters is None else placed(tensors.counters),
        copies=None if tensors.copies is None else placed(tensors.copies),
        dtypes=tensors.dtypes,
    )


# By back end, its path and device: families that agree; and what the first one that does not has.
_agree: dict[tuple[str, str, torch.device], set[Family]] = defaultdict(set)
_fault: dict[tuple[str, str, torch.device], str] = {}


def is_on() -> bool:
    """Whether FASTLARS_CHECK leaves the check on."""
    value = os.environ.get("FASTLARS_CHECK", "") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"FASTLARS_CHECK must be 0 or 1, got {value!r}")
    return value == "1"


def why_not(
    backend: Backend,
    device: torch.device,
    rule: Rule | GradientNorm,
    dtypes: Dtypes,
    rounds: bool = False,
) -> str:
    """Why a back end is not to be trusted on a device; empty where it agrees with the reference.

    Checked once a process for each device and family, and never again on a device on which one
    family was wrong. Nothing is checked inside a recording of a CUDA graph, which cannot wait, in a
    forked process, or where memory is short.
    """
    where = (backend.name, getattr(backend, "path", ""), device)
    checked = family(rule, dtypes, rounds)
    if checked in _agree[where] or not is_on():
        return ""
    if where not in _fault:
        # A process that was forked from one with threads waits for ever in torch's parallel
        # operations, which the small list takes and a small model may not.
        if is_capturing(device) or forks.happened:
            return ""
        try:
            found = difference(backend, checked, device)
        except torch.OutOfMemoryError:
            return ""
        if not found:
            _agree[where].add(checked)
            return ""
        _fault[where] = f"{checked}: {found}"
    return f"the {backend.name} back end fails its check on {device} ({_fault[where]})"
