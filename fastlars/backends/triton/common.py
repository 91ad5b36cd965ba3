"""Shared by all rules on Triton: csrc/rules/common.h line by line; rules as kernel arguments.

A rule's module has the rule's name, and holds its arithmetic and its kernels. ``prepare`` has one
program for each tensor, which computes the tensor's coefficients in float64. ``measure`` and
``apply`` have one program for each chunk of a tensor, and load the coefficients in float32. If each
chunk computed them, it would wait for a hundred operations in float64, of which many GPUs do two
per clock cycle.

Division and square root round as IEEE 754 requires, and kernels are compiled without fused
multiply-add, so that all back ends round alike.
"""

from __future__ import annotations

import struct
from collections import namedtuple
from functools import cache, lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastlars.rules import GradientNorm, Rule

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
NUMBER_OFFSET = tl.constexpr(2**52 + 1)


def encode(value: float) -> int:
    """A float of at least 0 as an integer that ``decoded`` turns back into a float64.

    Triton makes a float32 of every float in a tuple, so integers are passed. It compiles a kernel
    anew for an integer that is 1, a multiple of 16, or fits 32 bits. 2 * bits + 1 + 2^52, wrapped
    to int64, is none of these for any float from 0 to infinity: it is odd, and at least 2^52 - 1
    away from 0.
    """
    (bits,) = struct.unpack("<Q", struct.pack("<d", value + 0.0))  # + 0.0: turns -0.0 into 0.0
    encoded = 2 * bits + NUMBER_OFFSET.value
    return int.from_bytes(encoded.to_bytes(8, "little"), "little", signed=True)


@cache
def _argument_type(rule: str, names: tuple[str, ...]) -> Any:
    return namedtuple(rule, names)


@lru_cache(maxsize=1024)  # a schedule of momentum or weight decay makes a new rule every step
def rule_argument(rule: Rule | GradientNorm) -> Any:
    """The rule's ``constants`` as one kernel argument.

    Words and flags are compile-time constants; numbers are encoded. Kernels annotate the argument
    as ``rules.LarsRule`` etc., so that mypy knows the fields. Not as ``LarsRule``: Triton rejects
    the annotation if the class was imported by its own name.
    """
    options = dict(rule_options(rule)[1])
    values = [
        tl.constexpr(options[name]) if name in options else encode(value)
        for name, value in rule.constants.items()
    ]
    return _argument_type(rule.name, tuple(rule.constants))(*values)


@lru_cache(maxsize=1024)
def rule_options(rule: Rule | GradientNorm) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The rule's name, words and flags: what kernels are compiled for."""
    return rule.name, tuple(
        (name, getattr(rule, name))
        for name, value in rule.constants.items()
        if name in rule.CHOICES or isinstance(value, bool)
    )


class StepScalars(NamedTuple):
    """A step's scalars, in float64."""

    lr: tl.tensor
    gradient_scale: tl.tensor
    step_taken: tl.tensor  # false: the step changes nothing


@triton.jit
def step_scalars(
    device_scalars: tl.tensor, lr: tl.tensor, gradient_scale: tl.tensor
) -> StepScalars:
    """Read from ``device_scalars`` if given, so that the host need not wait for them; otherwise the
    values that were passed."""
    if device_scalars is None:
        scalars = StepScalars(double(lr), double(gradient_scale), double(0.0) == 0.0)
    else:
        skip = tl.load(device_scalars + 2)
        scalars = StepScalars(tl.load(device_scalars), tl.load(device_scalars + 1), skip == 0.0)
    return scalars


@triton.jit
def decoded(encoded: tl.tensor) -> tl.tensor:
    """The float64 that was passed to ``encode``."""
    return ((encoded.to(tl.uint64) - NUMBER_OFFSET) >> 1).to(tl.float64, bitcast=True)


@triton.jit
def double(value: tl.tensor) -> tl.tensor:
    """``value`` as a float64. Triton's interpreter passes Python numbers, which have no ``to``."""
    return tl.full((), value, tl.float64)


@triton.jit
def single(value: tl.tensor) -> tl.tensor:
    """The nearest float32."""
    return double(value).to(tl.float32)


@triton.jit
def coefficient(value: tl.tensor) -> tl.tensor:
    """``value`` as a float32, clamped to the largest one: lr * ratio can overflow even where the
    ratio does not."""
    return single(tl.where((value > LARGEST_FLOAT) & (value < INFINITY), LARGEST_FLOAT, value))


@triton.jit
def power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base to the whole part of exponent, by repeated squaring: the same bits on every device."""
    result = double(1.0)
    left = exponent.to(tl.int64)
    while left > 0:
        result = tl.where(left % 2 == 1, result * base, result)
        base = base * base
        left = left // 2
    return result


@triton.jit
def bounded(value: tl.tensor, lower: tl.tensor, upper: tl.tensor) -> tl.tensor:
    raised = tl.where(value < lower, lower, value)
    return tl.where(raised > upper, upper, raised)


@triton.jit
def guarded_ratio(
    weight: tl.tensor,
    update: tl.tensor,
    numerator: tl.tensor,
    denominator: tl.tensor,
    floor: tl.tensor,
    ceiling: tl.tensor,
) -> tl.tensor:
    """numerator / denominator within [floor, ceiling]; 1 where either sum of squares is 0 or
    NaN."""
    nonzero = (weight > 0.0) & (update > 0.0)
    ratio = bounded(numerator / tl.where(nonzero, denominator, double(1.0)), floor, ceiling)
    # The ratio overflows float32 for gradients around 1e-40. The largest float times such a
    # gradient is a sensible step; infinity times it is not.
    ratio = tl.where((ratio > LARGEST_FLOAT) & (numerator < INFINITY), double(LARGEST_FLOAT), ratio)
    return tl.where(nonzero, ratio, double(1.0))
