"""RMSprop warm-up. Akiba, Suzuki, Fukuda, "Extremely Large Minibatch SGD: Training ResNet-50 on
ImageNet in 15 Minutes", 2017.

d = g + wd w,  v = beta2 v + (1 - beta2) d^2
b = mu b + a d + (1 - a) (lr_rmsprop / lr) d / (sqrt(v) + eps)      (a: the share of SGD)
w = w - lr b
"""

from __future__ import annotations

from torch import Tensor

from fastlars.backends.reference.common import coefficient
from fastlars.rules import RmspropWarmupRule


def update(
    rule: RmspropWarmupRule,
    lr: float,
    q: float,
    w: Tensor,
    g: Tensor,
    states: list[Tensor],
    step: Tensor,
) -> Tensor:
    share = rule.sgd_share(float(step) - 1.0)
    b, v = (x.to(w.dtype) for x in states)
    d = g + rule.weight_decay * w
    update = share * d
    if share < 1.0:
        v = rule.square_decay * v + (1.0 - rule.square_decay) * d.square()
        states[1].copy_(v)
        rmsprop = (1.0 - share) * rule.lr_rmsprop / lr if lr > 0.0 else 0.0
        update = update + coefficient(rmsprop) * (d / (v.sqrt() + rule.eps))
    b = rule.momentum * b + update
    states[0].copy_(b)
    return w - lr * b
