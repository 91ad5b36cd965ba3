"""LAMB. You et al., "Large Batch Optimization for Deep Learning", 2020.

m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
r = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps),  u = r + wd w
q = phi(|w|) / |u|,           phi(z) = min(max(z, lower), upper)
w = w - lr q u
"""

from __future__ import annotations

from torch import Tensor

from fastlars.backends.reference.common import coefficient, guarded_ratio
from fastlars.rules import LambRule


def advance(rule: LambRule, w: Tensor, g: Tensor, states: list[Tensor]) -> None:
    m, v = (x.to(w.dtype) for x in states)
    # Not + 0 w: an infinite weight would make NaN of moments that do not depend on it.
    d = g + rule.weight_decay * w if rule.decay == "gradient" and rule.weight_decay else g
    m = rule.beta1 * m + (1.0 - rule.beta1 if rule.grad_averaging else 1.0) * d
    v = rule.beta2 * v + (1.0 - rule.beta2) * d.square()
    states[0].copy_(m)
    states[1].copy_(v)


def direction(rule: LambRule, w: Tensor, states: list[Tensor], step: Tensor) -> Tensor:
    """u, from the stored moments."""
    m, v = (x.to(w.dtype) for x in states)
    if rule.bias_correction == "moments":
        m = m / (1.0 - rule.beta1 ** float(step))
        v = v / (1.0 - rule.beta2 ** float(step))
    r = m / (v.sqrt() + rule.eps)
    return r + rule.weight_decay * w if rule.decay == "update" and rule.weight_decay else r


def measured(
    rule: LambRule, w: Tensor, g: Tensor, states: list[Tensor], step: Tensor
) -> tuple[Tensor, Tensor]:
    return w, direction(rule, w, states, step)


def trust_ratio(rule: LambRule, lr: float, w: float, u: float) -> float:
    if rule.decay == "decoupled":
        w = abs((1.0 - lr * rule.weight_decay) * w)
    phi = min(max(w, rule.lower), rule.upper)
    q = guarded_ratio(w, u, phi, u + rule.ratio_eps)
    return min(q, 1.0) if rule.trust_clip else q


def update(
    rule: LambRule,
    lr: float,
    q: float,
    w: Tensor,
    g: Tensor,
    states: list[Tensor],
    step: Tensor,
) -> Tensor:
    u = direction(rule, w, states, step)
    if rule.decay == "decoupled":
        w = (1.0 - lr * rule.weight_decay) * w
    if rule.bias_correction == "rate":
        lr = lr / (1.0 - rule.beta1 ** float(step))
    return w - coefficient(lr * q) * u
