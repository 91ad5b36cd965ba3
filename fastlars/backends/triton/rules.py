"""LARS and LAMB for Triton: csrc/core/rules.h and trust.h, line by line.

Kernels derive a tensor's coefficients in float64, then call these functions on chunks of float32.
Division and square root are rounded as IEEE 754 says, and kernels are compiled without fused
multiply-add, so that all back ends round alike.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
NEVER_STEPPED = tl.constexpr(-1.0)  # the state last_lr of a tensor that was never stepped
STEP, SCALED, GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # LarsRule.BUFFERS
UPDATE, DECOUPLED, GRADIENT_DECAY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MOMENTS, NONE, RATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # bias corrections


class Now(NamedTuple):
    """What changes from step to step, in float64; and whether the step is to be taken."""

    lr: tl.tensor
    gradient_scale: tl.tensor
    live: tl.tensor


class LarsRule(NamedTuple):
    """float64 numbers and compile-time choices, as the host's rule of the same name."""

    momentum: tl.tensor
    dampening: tl.tensor
    weight_decay: tl.tensor
    trust_coefficient: tl.tensor
    eps: tl.tensor
    BUFFER: tl.constexpr
    COMBINED: tl.constexpr
    NESTEROV: tl.constexpr
    CORRECTS: tl.constexpr
    TRUST_CLIP: tl.constexpr


class LarsCoefficients(NamedTuple):
    """float32, one each per tensor."""

    gradient_scale: tl.tensor
    weight_decay: tl.tensor
    decay: tl.tensor  # of the buffer: momentum, corrected for a changed learning rate
    undamped: tl.tensor  # 1 - dampening
    inner: tl.tensor  # what d is multiplied with before it enters the buffer
    outer: tl.tensor  # what the buffer is multiplied with before it leaves the weight
    momentum: tl.tensor


class LambRule(NamedTuple):
    """float64 numbers and compile-time choices, as the host's rule of the same name."""

    beta1: tl.tensor
    beta2: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    lower: tl.tensor
    upper: tl.tensor
    ratio_eps: tl.tensor
    DECAY: tl.constexpr
    CORRECTION: tl.constexpr
    AVERAGING: tl.constexpr
    TRUST_CLIP: tl.constexpr


class LambCoefficients(NamedTuple):
    """float32, one each per tensor."""

    gradient_scale: tl.tensor
    gradient_decay: tl.tensor
    beta1: tl.tensor
    gradient_weight: tl.tensor
    beta2: tl.tensor
    square_weight: tl.tensor
    correction1: tl.tensor
    correction2: tl.tensor
    eps: tl.tensor
    update_decay: tl.tensor
    shrink: tl.tensor  # 1 - lr wd when the decay is decoupled, else 1
    rate: tl.tensor  # lr q


@triton.jit
def double(value: tl.tensor) -> tl.tensor:
    """A float64, also of the Python number that the interpreter hands over."""
    return tl.full((), value, tl.float64)


@triton.jit
def single(value: tl.tensor) -> tl.tensor:
    """The nearest float32."""
    return tl.full((), value, tl.float64).to(tl.float32)


@triton.jit
def coefficient(value: tl.tensor) -> tl.tensor:
    """A ratio that a float just holds does not when the learning rate is in it."""
    return single(tl.where((value > LARGEST_FLOAT) & (value < INFINITY), LARGEST_FLOAT, value))


@triton.jit
def power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base to a whole exponent, by squaring: the same bits on every device."""
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


@triton.jit
def lars_trust_ratio(rule: LarsRule, now: Now, weight: tl.tensor, update: tl.tensor) -> tl.tensor:
    """separate: h |w| / (|g| + wd |w| + eps); combined: h |w| / (|g + wd w| + eps)."""
    weight_norm = tl.sqrt(weight)
    denominator = tl.sqrt(update)
    if not rule.COMBINED:
        denominator += rule.weight_decay * weight_norm
    q = guarded_ratio(weight, update, rule.trust_coefficient * weight_norm, denominator + rule.eps)
    if rule.TRUST_CLIP:
        # LARC: the local rate lr q never exceeds lr.
        positive = now.lr > 0.0
        clipped = tl.where(positive, q / tl.where(positive, now.lr, double(1.0)), double(1.0))
        q = tl.where(clipped > 1.0, double(1.0), clipped)
    return q


@triton.jit
def lars_coefficients(
    rule: LarsRule, now: Now, last_lr: tl.tensor, trust: tl.tensor
) -> LarsCoefficients:
    # Goyal et al., remark 2: a buffer that holds lr times a gradient is rescaled when lr changes.
    stepped_before = last_lr != NEVER_STEPPED
    decay = rule.momentum.to(tl.float32)
    if rule.CORRECTS:
        corrects = stepped_before & (last_lr != 0.0)
        correction = tl.div_rn(now.lr.to(tl.float32), tl.where(corrects, last_lr, 1.0))
        decay *= tl.where(corrects, correction, 1.0)
    inner = double(1.0)
    outer = double(1.0)
    if rule.BUFFER == STEP:
        inner = now.lr * trust
    elif rule.BUFFER == SCALED:
        inner = trust
        outer = now.lr
    else:
        outer = now.lr * trust
    return LarsCoefficients(
        now.gradient_scale.to(tl.float32),
        rule.weight_decay.to(tl.float32),
        decay,
        tl.where(stepped_before, (1.0 - rule.dampening).to(tl.float32), 1.0),
        coefficient(inner),
        coefficient(outer),
        rule.momentum.to(tl.float32),
    )


@triton.jit
def lars_measured(
    c: LarsCoefficients, w: tl.tensor, g: tl.tensor, COMBINED: tl.constexpr
) -> tl.tensor:
    """What |.| is taken of beside the weight: g, or g + wd w."""
    scaled = c.gradient_scale * g
    if COMBINED:
        scaled = scaled + c.weight_decay * w
    return scaled


@triton.jit
def lars_update(
    c: LarsCoefficients, w: tl.tensor, g: tl.tensor, buffer: tl.tensor, NESTEROV: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The new weight, and the advanced buffer."""
    d = c.gradient_scale * g + c.weight_decay * w
    scaled = c.inner * d
    buffer = c.decay * buffer + c.undamped * scaled
    direction = buffer
    if NESTEROV:
        direction = scaled + c.momentum * buffer
    return w - c.outer * direction, buffer


@triton.jit
def lars_update_without_momentum(c: LarsCoefficients, w: tl.tensor, g: tl.tensor) -> tl.tensor:
    d = c.gradient_scale * g + c.weight_decay * w
    return w - c.outer * (c.inner * d)


@triton.jit
def lamb_shrink(rule: LambRule, now: Now) -> tl.tensor:
    shrink = double(1.0)
    if rule.DECAY == DECOUPLED:
        shrink = 1.0 - now.lr * rule.weight_decay
    return shrink


@triton.jit
def lamb_trust_ratio(rule: LambRule, now: Now, weight: tl.tensor, update: tl.tensor) -> tl.tensor:
    """phi(|w|) / (|u| + eps), phi(z) = min(max(z, lower), upper)."""
    shrink = lamb_shrink(rule, now)
    weight = weight * shrink * shrink
    weight_norm = tl.sqrt(weight)
    raised = tl.where(weight_norm < rule.lower, rule.lower, weight_norm)
    phi = tl.where(raised > rule.upper, rule.upper, raised)
    q = guarded_ratio(weight, update, phi, tl.sqrt(update) + rule.ratio_eps)
    if rule.TRUST_CLIP:
        q = tl.where(q > 1.0, double(1.0), q)
    return q


@triton.jit
def lamb_coefficients(
    rule: LambRule, now: Now, step: tl.tensor, trust: tl.tensor
) -> LambCoefficients:
    """``step`` counts from 1."""
    lr = now.lr
    correction1 = double(1.0)
    correction2 = double(1.0)
    if rule.CORRECTION != NONE:
        correction1 = 1.0 - power(rule.beta1, step)
    if rule.CORRECTION == MOMENTS:
        correction1 = 1.0 / correction1
        correction2 = 1.0 / (1.0 - power(rule.beta2, step))
    if rule.CORRECTION == RATE:
        lr = lr / correction1
        correction1 = double(1.0)
    gradient_decay = double(0.0)
    if rule.DECAY == GRADIENT_DECAY:
        gradient_decay = rule.weight_decay
    gradient_weight = double(1.0)
    if rule.AVERAGING:
        gradient_weight = 1.0 - rule.beta1
    update_decay = double(0.0)
    if rule.DECAY == UPDATE:
        update_decay = rule.weight_decay
    return LambCoefficients(
        now.gradient_scale.to(tl.float32),
        gradient_decay.to(tl.float32),
        rule.beta1.to(tl.float32),
        gradient_weight.to(tl.float32),
        rule.beta2.to(tl.float32),
        (1.0 - rule.beta2).to(tl.float32),
        correction1.to(tl.float32),
        correction2.to(tl.float32),
        rule.eps.to(tl.float32),
        update_decay.to(tl.float32),
        lamb_shrink(rule, now).to(tl.float32),
        coefficient(lr * trust),
    )


@triton.jit
def lamb_moments(
    c: LambCoefficients, w: tl.tensor, g: tl.tensor, m: tl.tensor, v: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    # Not + 0 w: an infinite weight would make NaN of moments that it has no part in.
    scaled = c.gradient_scale * g
    d = tl.where(c.gradient_decay != 0.0, scaled + c.gradient_decay * w, scaled)
    m = c.beta1 * m + c.gradient_weight * d
    v = c.beta2 * v + c.square_weight * (d * d)
    return m, v


@triton.jit
def lamb_direction(c: LambCoefficients, w: tl.tensor, m: tl.tensor, v: tl.tensor) -> tl.tensor:
    """u, whose norm the ratio divides by."""
    r = tl.div_rn(c.correction1 * m, tl.sqrt_rn(c.correction2 * v) + c.eps)
    return tl.where(c.update_decay != 0.0, r + c.update_decay * w, r)


@triton.jit
def lamb_update(c: LambCoefficients, w: tl.tensor, u: tl.tensor) -> tl.tensor:
    return c.shrink * w - c.rate * u
