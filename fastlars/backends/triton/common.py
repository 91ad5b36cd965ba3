"""What rules share on Triton: csrc/rules/common.h line by line, and rules as kernel arguments.

The file ``<name>.py`` of a rule holds its arithmetic and its kernels ``measure`` and ``apply``, and
the back end finds it by that name. Kernels compute a tensor's coefficients in float64, then update
chunks in float32. Division and square root are rounded as IEEE 754 says, and kernels are compiled
without fused multiply-add, so that all back ends round alike.
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
    """A float of at least 0 as an integer, from which :func:`decoded` makes a float64.

    Triton turns floats in a tuple into float32, and compiles a kernel anew for an integer there
    that is 1, a multiple of 16, or fits 32 bits. 2 * bits + 1 + 2^52, wrapped to int64, is none of
    them for any float from 0 to infinity: it is odd, and at least 2^52 - 1 away from 0.
    """
    (bits,) = struct.unpack("<Q", struct.pack("<d", value + 0.0))  # + 0.0: -0.0 has a sign
    encoded = 2 * bits + NUMBER_OFFSET.value
    return int.from_bytes(encoded.to_bytes(8, "little"), "little", signed=True)


@cache
def _argument_type(rule: str, names: tuple[str, ...]) -> Any:
    return namedtuple(rule, names)


@lru_cache(maxsize=1024)  # a schedule of momentum or weight decay makes a new rule every step
def argument(rule: Rule | GradientNorm) -> Any:
    """The rule's ``constants`` as one argument of a kernel.

    Numbers are encoded. Words and flags are known at compile time, and words stay words. Kernels
    annotate it as ``rules.LarsRule`` etc., so that mypy knows its fields and words; Triton takes
    no class there that was imported by its own name.
    """
    values = [
        tl.constexpr(getattr(rule, name))
        if name in rule.CHOICES or isinstance(value, bool)
        else encode(value)
        for name, value in rule.constants.items()
    ]
    return _argument_type(rule.name, tuple(rule.constants))(*values)


class StepScalars(NamedTuple):
    """What changes from step to step, in float64."""

    lr: tl.tensor
    gradient_scale: tl.tensor
    step_taken: tl.tensor  # false: nothing is to be changed


@triton.jit
def step_scalars(
    device_scalars: tl.tensor, lr: tl.tensor, gradient_scale: tl.tensor
) -> StepScalars:
    """From the device where it has them, so that the host need not wait; else by value."""
    if device_scalars is None:
        scalars = StepScalars(double(lr), double(gradient_scale), double(0.0) == 0.0)
    else:
        skip = tl.load(device_scalars + 2)
        scalars = StepScalars(tl.load(device_scalars), tl.load(device_scalars + 1), skip == 0.0)
    return scalars


@triton.jit
def decoded(encoded: tl.tensor) -> tl.tensor:
    """The float64 that :func:`encode` was given."""
    return ((encoded.to(tl.uint64) - NUMBER_OFFSET) >> 1).to(tl.float64, bitcast=True)


@triton.jit
def double(value: tl.tensor) -> tl.tensor:
    """A float64, also of a Python number, which is what the interpreter passes."""
    return tl.full((), value, tl.float64)


@triton.jit
def single(value: tl.tensor) -> tl.tensor:
    """The nearest float32."""
    return double(value).to(tl.float32)


@triton.jit
def coefficient(value: tl.tensor) -> tl.tensor:
    """lr * ratio can overflow float32 even where the ratio does not: it is then the largest."""
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
def guarded_ratio(
    weight: tl.tensor, update: tl.tensor, numerator: tl.tensor, denominator: tl.tensor
) -> tl.tensor:
    """numerator / denominator; 1 where either sum of squares is 0 or NaN."""
    nonzero = (weight > 0.0) & (update > 0.0)
    ratio = numerator / tl.where(nonzero, denominator, double(1.0))
    # Gradients around 1e-40 ask for more than a float holds. The largest float times such a
    # gradient is still a sensible step, infinity times it is not.
    ratio = tl.where((ratio > LARGEST_FLOAT) & (numerator < INFINITY), double(LARGEST_FLOAT), ratio)
    return tl.where(nonzero, ratio, double(1.0))
