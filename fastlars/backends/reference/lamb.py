"""LAMB. You et al., "Large Batch Optimization for Deep Learning", 2020.

m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
r = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps),  u = r + wd w
q = phi(|w|) / |u|,           phi(z) = min(max(z, lower), upper)      (within ratio_bounds)
w = w - lr q u

N-LAMB and NN-LAMB, of the paper's appendix, look one step ahead: r = m^ / (sqrt(v^) + eps),
m^ = beta1 m / (1 - beta1^(t+1)) + (1 - beta1) g / (1 - beta1^t)
v^ = beta2 v / (1 - beta2^t)                                            N-LAMB
v^ = beta2 v / (1 - beta2^(t+1)) + (1 - beta2) g^2 / (1 - beta2^t)      NN-LAMB
"""

from __future__ import annotations

from torch import Tensor

from fastlars.backends.reference.common import coefficient, guarded_ratio
from fastlars.rules import LambRule


def gradient(rule: LambRule, w: Tensor, g: Tensor) -> tuple[Tensor, float]:
    """What enters the first moment, and with which weight."""
    # Not + 0 w: an infinite weight would make NaN of moments that do not depend on it.
    d = g + rule.weight_decay * w if rule.decay == "gradient" and rule.weight_decay else g
    return d, 1.0 - rule.beta1 if rule.grad_averaging else 1.0


def advance(rule: LambRule, w: Tensor, g: Tensor, states: list[Tensor]) -> None:
    m, v = (x.to(w.dtype) for x in states)
    d, weight = gradient(rule, w, g)
    m = rule.beta1 * m + weight * d
    v = rule.beta2 * v + (1.0 - rule.beta2) * d.square()
    states[0].copy_(m)
    states[1].copy_(v)


def looking_ahead(
    beta: float, t: float, moment: Tensor, entering: Tensor, corrects: bool
) -> Tensor:
    """A moment as it would be after a step with the same gradient; ``entering`` has its weight."""
    if corrects:
        moment, entering = moment / (1.0 - beta ** (t + 1.0)), entering / (1.0 - beta**t)
    return beta * moment + entering


def direction(rule: LambRule, w: Tensor, g: Tensor, states: list[Tensor], step: Tensor) -> Tensor:
    """u, from the stored moments."""
    m, v = (x.to(w.dtype) for x in states)
    t, corrects = float(step), rule.bias_correction == "moments"
    d, weight = gradient(rule, w, g)
    if rule.nesterov != "none":
        m = looking_ahead(rule.beta1, t, m, weight * d, corrects)
    elif corrects:
        m = m / (1.0 - rule.beta1**t)
    if rule.nesterov == "both":
        v = looking_ahead(rule.beta2, t, v, (1.0 - rule.beta2) * d.square(), corrects)
    else:
        v = rule.beta2 * v if rule.nesterov == "first" else v
        v = v / (1.0 - rule.beta2**t) if corrects else v
    r = m / (v.sqrt() + rule.eps)
    return r + rule.weight_decay * w if rule.decay == "update" and rule.weight_decay else r


def measured(
    rule: LambRule, w: Tensor, g: Tensor, states: list[Tensor], step: Tensor
) -> tuple[Tensor, Tensor]:
    return w, direction(rule, w, g, states, step)


def trust_ratio(rule: LambRule, lr: float, w: float, u: float) -> float:
    if rule.decay == "decoupled":
        w = abs((1.0 - lr * rule.weight_decay) * w)
    phi = min(max(w, rule.lower), rule.upper)
    q = guarded_ratio(w, u, phi, u + rule.ratio_eps, rule.ratio_floor, rule.ratio_ceiling)
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
    u = direction(rule, w, g, states, step)
    if rule.decay == "decoupled":
        w = (1.0 - lr * rule.weight_decay) * w
    if rule.bias_correction == "rate":
        lr = lr / (1.0 - rule.beta1 ** float(step))
    return w - coefficient(lr * q) * u
