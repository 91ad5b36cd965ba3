"""LARS. You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017.

q = eta |w| / (|g| + wd |w| + eps)      (within ratio_bounds)
b = mu b + lr q (g + wd w)
w = w - b
"""

from __future__ import annotations

from torch import Tensor

from fastlars.backends.reference.common import coefficient, guarded_ratio
from fastlars.rules import LarsRule


def measured(
    rule: LarsRule, w: Tensor, g: Tensor, states: list[Tensor], last_lr: Tensor | None
) -> tuple[Tensor, Tensor]:
    return w, (g + rule.weight_decay * w if rule.ratio == "combined" else g)


def trust_ratio(rule: LarsRule, lr: float, w: float, u: float) -> float:
    decay = rule.weight_decay * w if rule.ratio == "separate" else 0.0
    bounds = rule.ratio_floor, rule.ratio_ceiling
    q = guarded_ratio(w, u, rule.trust_coefficient * w, u + decay + rule.eps, *bounds)
    if rule.trust_clip:
        return min(q / lr, 1.0) if lr > 0.0 else 1.0
    return q


def update(
    rule: LarsRule,
    lr: float,
    q: float,
    w: Tensor,
    g: Tensor,
    states: list[Tensor],
    last_lr: Tensor | None,
) -> Tensor:
    # lr and q enter before b (inner) or after it (outer).
    inner = coefficient({"step": lr * q, "scaled": q, "gradient": 1.0}[rule.buffer])
    outer = coefficient({"step": 1.0, "scaled": lr, "gradient": lr * q}[rule.buffer])
    s = inner * (g + rule.weight_decay * w)
    if not states:
        return w - outer * s
    undamped, correction = 1.0, 1.0
    if last_lr is not None and (last := float(last_lr)) != rule.NEVER_STEPPED:
        undamped = 1.0 - rule.dampening
        if rule.momentum_correction and last != 0.0:
            # Rounded as the last one was, so that an unchanged lr corrects nothing.
            correction = float(last_lr.new_tensor(lr)) / last
    b = rule.momentum * correction * states[0].to(w.dtype) + undamped * s
    states[0].copy_(b)
    return w - outer * (s + rule.momentum * b if rule.nesterov else b)
