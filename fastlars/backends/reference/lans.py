"""LANS. Zheng, Lin, Zha, Li, "Accelerated Large Batch Optimization of BERT Pretraining in 54
minutes", 2020.

g = g / (|g| + norm_eps)
m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
d = sqrt(v / (1 - beta2^t)) + eps
r = (m / (1 - beta1^t)) / d + wd w,  c = g / d + wd w
w = w - lr (beta1 phi(|w|) / |r| r + (1 - beta1) phi(|w|) / |c| c)
"""

from __future__ import annotations

from torch import Tensor

from fastlars.backends.reference.common import LARGEST_FLOAT, coefficient, guarded_ratio
from fastlars.rules import LansRule


def gradient_weight(rule: LansRule) -> float:
    return 1.0 - rule.beta1 if rule.grad_averaging else 1.0


def normalized(rule: LansRule, g: Tensor, norm: float) -> Tensor:
    return g if norm == 0.0 else g * min(1.0 / (norm + rule.norm_eps), LARGEST_FLOAT)


def decayed(rule: LansRule, w: Tensor, g: Tensor) -> Tensor:
    # Not + 0 w: an infinite weight would make NaN of moments that do not depend on it.
    return g + rule.weight_decay * w if rule.decay == "gradient" and rule.weight_decay else g


def advance(rule: LansRule, w: Tensor, g: Tensor, states: list[Tensor]) -> None:
    m, v = (x.to(w.dtype) for x in states)
    g = decayed(rule, w, g)
    m = rule.beta1 * m + gradient_weight(rule) * g
    v = rule.beta2 * v + (1.0 - rule.beta2) * g.square()
    states[0].copy_(m)
    states[1].copy_(v)


def directions(
    rule: LansRule, w: Tensor, g: Tensor, states: list[Tensor], step: Tensor
) -> tuple[Tensor, Tensor]:
    """r and c, from the stored moments."""
    m, v = (x.to(w.dtype) for x in states)
    if rule.bias_correction:
        m = m / (1.0 - rule.beta1 ** float(step))
        v = v / (1.0 - rule.beta2 ** float(step))
    d = v.sqrt() + rule.eps
    r, c = m / d, decayed(rule, w, g) / d
    if rule.decay == "update" and rule.weight_decay:
        decay = rule.weight_decay * w
        r, c = r + decay, c + decay
    return r, c


def measured(
    rule: LansRule, w: Tensor, g: Tensor, states: list[Tensor], step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return w, *directions(rule, w, g, states, step)


def trust_ratio(rule: LansRule, lr: float, w: float, r: float, c: float) -> tuple[float, float]:
    phi = min(max(w, rule.lower), rule.upper)
    return guarded_ratio(w, r, phi, r), guarded_ratio(w, c, phi, c)


def update(
    rule: LansRule,
    lr: float,
    q: tuple[float, float] | float,
    w: Tensor,
    g: Tensor,
    states: list[Tensor],
    step: Tensor,
) -> Tensor:
    r, c = directions(rule, w, g, states, step)
    q_r, q_c = q if isinstance(q, tuple) else (q, q)
    momentum_rate = coefficient(lr * rule.beta1 * q_r)
    gradient_rate = coefficient(lr * gradient_weight(rule) * q_c)
    return w - (momentum_rate * r + gradient_rate * c)
