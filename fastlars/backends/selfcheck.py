"""Checks a back end against the reference: both step the same small list of tensors.

The check runs when a process first uses a back end on a device, for the kernels that are about to
run. It finds what tests on another machine cannot: a compiler, driver or GPU with which the same
sources compute something else.
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
# Elements of each tensor. 16,401: two chunks of the CPU back end and five of the others, of which
# the last is not full; 4,096: one full chunk; 257: placed off every 16-byte boundary.
SIZES = (16_401, 4_096, 257, 1)
OFF_BOUNDARY = 257
# Learning rate, gradient scale and seed of stochastic rounding. The first step is one call of
# `step`, the second calls `measure` and `apply`, as sharded parameters do.
STEPS = (StepScalars(0.5, 1.0, 11), StepScalars(0.25, 0.5, 12))
# Tolerances, relative to a value and to its tensor's root mean square. float32 sums in another
# order differ by 1e-6. In shorter types a value halfway between two numbers can be rounded up by
# one back end and down by the other, in weight, copy and states, in either step: 4 roundings.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}


@dataclass(frozen=True)
class Combination:
    """A rule's options and the tensors' types: they select the kernels that are checked.

    Attributes:
        rule: the rule with its options; its numbers are replaced by those of ``rule.probe()``.
        dtypes: types of the list.
        rounds: whether bfloat16 weights are rounded stochastically.
    """

    rule: Rule | GradientNorm
    dtypes: Dtypes
    rounds: bool = False

    def __str__(self) -> str:
        return f"{self.rule.title}, {describe(self.dtypes, self.rounds)}"


def describe(dtypes: Dtypes, rounds: bool = False) -> str:
    """The types of a list, for messages.

    Example:
        >>> describe(Dtypes(torch.float32, torch.float16, torch.float32, copy=torch.float16))
        'float32 masters of float16 weights, float16 gradients, float32 states'
    """
    weight, grad, state, copy = (str(dtype).removeprefix("torch.") for dtype in astuple(dtypes))
    weights = f"{weight} weights" if dtypes.copy is None else f"{weight} masters of {copy} weights"
    rounding = ", stochastic rounding" if rounds else ""
    return f"{weights}, {grad} gradients, {state} states{rounding}"


@lru_cache(maxsize=1024)  # a schedule of momentum or weight decay makes a new rule every step
def combination(rule: Rule | GradientNorm, dtypes: Dtypes, rounds: bool = False) -> Combination:
    """What is checked before kernels of this rule and these types run."""
    return Combination(rule.probe(), dtypes, rounds and dtypes.weight == torch.bfloat16)


def difference(backend: Backend, tested: Combination, device: torch.device) -> str:
    """How the results of a back end differ from the reference's, or the error that it raises; empty
    if they agree. Waits for the device.

    Raises:
        OutOfMemoryError: the device has no memory left: not a fault of the back end.
        RuntimeError: an earlier operation on the device has failed.
    """
    tensors = _tensors(tested)
    expected = _step(Reference(), tested, _in_float64(tensors))
    with _waiting_allowed(device):
        try:
            results = _step(backend, tested, _on(tensors, device))
            found = [(name, x.detach().to("cpu", F64)) for name, x in results]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # An error of the compiler, the driver or a kernel: another back end is used instead.
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"
    types = (tested.dtypes.weight, tested.dtypes.state, tested.dtypes.copy or torch.float32)
    # Stochastic rounding errs by up to twice as much as rounding to nearest.
    tolerance = max(TOLERANCES[dtype] for dtype in types) * (2 if tested.rounds else 1)
    for (name, ours), (_, theirs) in zip(found, expected, strict=True):
        text = _compare(ours, theirs.to(F64), tolerance)
        if text:
            return f"{name} {text}"
    return ""


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """Permit waiting for the device, which ``torch.cuda.set_sync_debug_mode`` may forbid, and wait
    once: an error of an earlier operation is raised here, and not blamed on the back end."""
    on_cuda = device.type == "cuda" and torch.cuda.is_available()
    mode = torch.cuda.get_sync_debug_mode() if on_cuda else 0
    if mode:
        torch.cuda.set_sync_debug_mode("default")
    try:
        accelerator = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        if accelerator and accelerator.type == device.type:
            torch.accelerator.synchronize(device)
        yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


def _compare(found: Tensor, expected: Tensor, tolerance: float) -> str:
    allowed = tolerance * (expected.abs() + expected.square().mean().sqrt())
    # Not `> allowed`, which is false for NaN.
    wrong = ~((found - expected).abs() <= allowed)
    if not wrong.any():
        return ""
    at = int(wrong.flatten().nonzero()[0])
    actual, right = found.flatten()[at].item(), expected.flatten()[at].item()
    count = f"{int(wrong.sum())} of {wrong.numel()} wrong"
    return f"[{at}] is {actual:.6g} instead of {right:.6g} ({count})"


def _step(backend: Backend, tested: Combination, tensors: Tensors) -> list[tuple[str, Tensor]]:
    """Everything that two steps return or write, with names."""
    rule = tested.rule
    bound = backend.bind(tensors, backend.layout(tensors.weights))
    named = [("square norm", backend.measure(GradientNorm(), bound, StepScalars(0.0))[:, -1])]
    if isinstance(rule, GradientNorm):  # has no step
        return named
    for number, each in enumerate(STEPS):
        scalars = each if tested.rounds else replace(each, seed=None)
        if number == 0:
            report = backend.step(rule, bound, scalars)
        else:
            sums = backend.measure(rule, bound, scalars) if rule.adapt else None
            report = backend.apply(rule, bound, scalars, sums)
        names = ["trust ratio", *(f"{name} norm" for name in rule.norms if rule.adapt)]
        columns = zip(names, report.unbind(1), strict=False)
        named += [(f"{name} of step {number + 1}", column) for name, column in columns]
    lists = [("weight", tensors.weights), *zip(rule.states, tensors.states, strict=True)]
    lists += [("copy", tensors.copies or []), (str(rule.counter), tensors.counters or [])]
    named += [(f"{name} {i}", x) for name, values in lists for i, x in enumerate(values)]
    return named


def _tensors(tested: Combination) -> Tensors:
    """The list of tensors, on the host."""
    rule, dtypes = tested.rule, tested.dtypes

    def waves(scale: float, frequency: float, dtype: torch.dtype) -> list[Tensor]:
        # Not random: drawing numbers would change those of the training that is about to start.
        indices = [torch.arange(1, n + 1, dtype=F64, device="cpu") for n in SIZES]
        return [(scale * torch.sin(frequency * x)).to(dtype) for x in indices]

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
    """The same values in float64, for the reference. bfloat16 states stay bfloat16: their rounding
    is part of the rule. The rounding of weights is not: ``TOLERANCES`` allows for it."""
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
    """The same values on a device."""

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


# For each back end, launch path and device: the combinations that passed; the first failure.
_passed: dict[tuple[str, str, torch.device], set[Combination]] = defaultdict(set)
_failure: dict[tuple[str, str, torch.device], str] = {}


def is_on() -> bool:
    """Whether back ends are checked: FASTLARS_CHECK is not 0."""
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
    """Why a back end must not be used on a device; empty if it agrees with the reference.

    Each combination is checked once per process and device. After one failure the back end is not
    used on that device at all, and not checked again. Nothing is checked, and the back end is used,
    where a check cannot run: during capture of a CUDA graph (it would wait for the device), in a
    forked process, and when the device is out of memory.
    """
    key = (backend.name, getattr(backend, "path", ""), device)
    tested = combination(rule, dtypes, rounds)
    if tested in _passed[key] or not is_on():
        return ""
    if key not in _failure:
        # In a process that was forked from one with threads, torch's parallel operations hang. The
        # check would run some, even if a small model does not.
        if is_capturing(device) or forks.in_forked_process:
            return ""
        try:
            found = difference(backend, tested, device)
        except torch.OutOfMemoryError:
            return ""
        if not found:
            _passed[key].add(tested)
            return ""
        _failure[key] = f"{tested}: {found}"
    return f"the {backend.name} back end fails its check on {device} ({_failure[key]})"
