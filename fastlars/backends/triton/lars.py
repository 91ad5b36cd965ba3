"""LARS: csrc/rules/lars.h line by line, and its kernels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastlars import rules
from fastlars.backends.triton.common import (
    StepScalars,
    coefficient,
    decoded,
    double,
    guarded_ratio,
    single,
    step_scalars,
)
from fastlars.backends.triton.memory import (
    Chunk,
    Types,
    locate,
    read,
    write,
    write_weight,
)
from fastlars.backends.triton.sums import store_sums, sums_of
from fastlars.backends.triton.tensor import (
    load_coefficients,
    load_counter,
    store_coefficients,
    store_counter,
    store_report,
)

NEVER_STEPPED = tl.constexpr(rules.LarsRule.NEVER_STEPPED)


class LarsCoefficients(NamedTuple):
    """float32 coefficients of one tensor."""

    gradient_scale: tl.tensor
    weight_decay: tl.tensor
    decay: tl.tensor  # factor of the buffer: momentum, corrected for a changed learning rate
    one_minus_dampening: tl.tensor  # 1 in the first step
    inner: tl.tensor  # factor of d, before it is added to the buffer
    outer: tl.tensor  # factor of the buffer, before it is subtracted from the weight
    momentum: tl.tensor


FIELDS = tl.constexpr(len(LarsCoefficients._fields))


@triton.jit
def trust_ratio(
    rule: rules.LarsRule, scalars: StepScalars, weight: tl.tensor, update: tl.tensor
) -> tl.tensor:
    """separate: eta |w| / (|g| + wd |w| + eps); combined: eta |w| / (|g + wd w| + eps)."""
    weight_norm = tl.sqrt(weight)
    denominator = tl.sqrt(update)
    if rule.ratio == "separate":
        denominator += decoded(rule.weight_decay) * weight_norm
    numerator = decoded(rule.trust_coefficient) * weight_norm
    floor, ceiling = decoded(rule.ratio_floor), decoded(rule.ratio_ceiling)
    q = guarded_ratio(weight, update, numerator, denominator + decoded(rule.eps), floor, ceiling)
    if rule.trust_clip:
        # LARC: the local rate lr q never exceeds lr.
        positive = scalars.lr > 0.0
        clipped = tl.where(positive, q / tl.where(positive, scalars.lr, double(1.0)), double(1.0))
        q = tl.where(clipped > 1.0, double(1.0), clipped)
    return q


@triton.jit
def coefficients(
    rule: rules.LarsRule, scalars: StepScalars, last_lr: tl.tensor, ratio: tl.tensor
) -> LarsCoefficients:
    # Goyal et al., remark 2: a buffer that holds lr times a gradient is rescaled when lr changes.
    stepped_before = last_lr != NEVER_STEPPED
    momentum = decoded(rule.momentum).to(tl.float32)
    decay = momentum
    if rule.momentum_correction:
        corrects = stepped_before & (last_lr != 0.0)
        correction = tl.div_rn(scalars.lr.to(tl.float32), tl.where(corrects, last_lr, 1.0))
        decay *= tl.where(corrects, correction, 1.0)
    inner = double(1.0)
    outer = double(1.0)
    if rule.buffer == "step":
        inner = scalars.lr * ratio
    elif rule.buffer == "scaled":
        inner = ratio
        outer = scalars.lr
    else:
        outer = scalars.lr * ratio
    one_minus_dampening = (1.0 - decoded(rule.dampening)).to(tl.float32)
    return LarsCoefficients(
        gradient_scale=scalars.gradient_scale.to(tl.float32),
        weight_decay=decoded(rule.weight_decay).to(tl.float32),
        decay=decay,
        one_minus_dampening=tl.where(stepped_before, one_minus_dampening, 1.0),
        inner=coefficient(inner),
        outer=coefficient(outer),
        momentum=momentum,
    )


@triton.jit
def measured(rule: rules.LarsRule, c: LarsCoefficients, w: tl.tensor, g: tl.tensor) -> tl.tensor:
    """The vector whose norm is the second one: g, or g + wd w."""
    scaled = c.gradient_scale * g
    if rule.ratio == "combined":
        scaled = scaled + c.weight_decay * w
    return scaled


@triton.jit
def update_with_momentum(
    rule: rules.LarsRule, c: LarsCoefficients, w: tl.tensor, g: tl.tensor, buffer: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The new weight, and the advanced buffer."""
    d = c.gradient_scale * g + c.weight_decay * w
    scaled = c.inner * d
    buffer = c.decay * buffer + c.one_minus_dampening * scaled
    direction = buffer
    if rule.nesterov:
        direction = scaled + c.momentum * buffer
    return w - c.outer * direction, buffer


@triton.jit
def update_without_momentum(c: LarsCoefficients, w: tl.tensor, g: tl.tensor) -> tl.tensor:
    d = c.gradient_scale * g + c.weight_decay * w
    return w - c.outer * (c.inner * d)


@triton.jit
def _measure(
    chunk: Chunk,
    slots: tl.tensor,
    rule: rules.LarsRule,
    c: LarsCoefficients,
    types: Types,
    WHOLE: tl.constexpr,
) -> None:
    w = read(chunk.weight, chunk, types.weight, WHOLE, False)
    g = read(chunk.grad, chunk, types.grad, WHOLE, False)
    store_sums(slots, (w, measured(rule, c, w, g)))


@triton.jit
def _apply(
    chunk: Chunk,
    seed: tl.tensor,
    rule: rules.LarsRule,
    c: LarsCoefficients,
    types: Types,
    WHOLE: tl.constexpr,
) -> None:
    w = read(chunk.weight, chunk, types.weight, WHOLE, True)
    g = read(chunk.grad, chunk, types.grad, WHOLE, True)
    if types.state is None:
        w = update_without_momentum(c, w, g)
    else:
        base = chunk.states[0]
        buffer = read(base, chunk, types.state, WHOLE, True)
        w, buffer = update_with_momentum(rule, c, w, g, buffer)
        write(base, chunk, buffer, types.state, WHOLE, True)
    write_weight(chunk, w, seed, types, WHOLE)


@triton.jit
def measure(
    table: tl.tensor,
    numel: tl.tensor,
    chunks: tl.tensor,
    slots: tl.tensor,
    device_scalars: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    rule: rules.LarsRule,
    types: Types,
) -> None:
    """For each chunk: store the sums of squares of w, and of g or g + wd w."""
    scalars = step_scalars(device_scalars, lr, gradient_scale)
    chunk = locate(table, numel, chunks, scalars, False)
    # Only the two coefficients that need no ratio are used: all else is removed by the compiler.
    c = coefficients(rule, scalars, single(NEVER_STEPPED), double(1.0))
    if chunk.whole:
        _measure(chunk, slots, rule, c, types, True)
    else:
        _measure(chunk, slots, rule, c, types, False)


@triton.jit(do_not_specialize_on_alignment=["sums"])
def prepare(
    table: tl.tensor,
    numel: tl.tensor,
    first_chunk: tl.tensor,
    gradient_slots: tl.tensor,
    gradient_sums: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    report: tl.tensor,
    sizes: tl.tensor,
    coefficient_table: tl.tensor,
    device_scalars: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    rule: rules.LarsRule,
    LANES: tl.constexpr,
) -> None:
    """For each tensor: store its coefficients, what the step reports of it, and the counter, which
    is the last rate."""
    scalars = step_scalars(device_scalars, lr, gradient_scale)
    tensor = tl.program_id(0).to(tl.int64)
    ratio = double(1.0)
    squares = (double(float("nan")), double(float("nan")))
    if rule.adapt:
        squares = sums_of(tensor, first_chunk, slots, sums, 2, LANES)
        ratio = trust_ratio(rule, scalars, squares[0], squares[1])
    store_report(report, tensor, ratio, squares)
    c = coefficients(rule, scalars, load_counter(table, tensor), ratio)
    store_coefficients(tensor, numel, sizes, coefficient_table, scalars, c)
    store_counter(table, tensor, scalars, scalars.lr)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["streams"])
def apply(
    table: tl.tensor,
    sizes: tl.tensor,
    chunks: tl.tensor,
    coefficient_table: tl.tensor,
    seed: tl.int64,
    streams: tl.tensor,
    rule: rules.LarsRule,
    types: Types,
) -> None:
    """For each chunk: write buffers and weights."""
    chunk = locate(table, sizes, chunks, None, rule.adapt, streams)
    c = LarsCoefficients(*load_coefficients(coefficient_table, chunk, FIELDS))
    if chunk.whole:
        _apply(chunk, seed, rule, c, types, True)
    else:
        _apply(chunk, seed, rule, c, types, False)
