"""The rules in plain torch: the specification that every other back end is tested against.

It serves float64 and strided tensors, and any device that no other back end serves. Arithmetic is
float32 for float32 and below, float64 for float64; sums of squares are float64 wherever the device
has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import Mismatch, Scalars, Tensors
from fastlars.rules import GradientNorm, LambRule, LarsRule, RmspropWarmupRule, Rule

LARGEST_FLOAT = torch.finfo(torch.float32).max


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_of_squares(x: Tensor) -> float:
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    return float(x.to(exact).square().sum())


def trust_ratio(rule: Rule, now: Scalars, weight: float, update: float) -> float:
    """The trust ratio for two sums of squares; 1 where either is 0."""
    if isinstance(rule, RmspropWarmupRule) or not rule.adapt:
        return 1.0
    w, u = math.sqrt(weight), math.sqrt(update)
    if isinstance(rule, LarsRule):
        numerator = rule.trust_coefficient * w
        denominator = u + (rule.weight_decay * w if rule.ratio == "separate" else 0.0) + rule.eps
    else:
        shrunk = (1.0 - now.lr * rule.weight_decay) * w if rule.decay == "decoupled" else w
        w = abs(shrunk)
        numerator = min(max(w, rule.lower), rule.upper)
        denominator = u + rule.ratio_eps
    q = numerator / denominator if w > 0.0 and u > 0.0 else 1.0
    if q > LARGEST_FLOAT and math.isfinite(numerator):
        q = LARGEST_FLOAT
    if not rule.trust_clip:
        return q
    if isinstance(rule, LambRule):
        return min(q, 1.0)
    return min(q / now.lr, 1.0) if now.lr > 0.0 else 1.0


def _coefficient(value: float) -> float:
    """A ratio that a float32 just holds does not when the learning rate is in it."""
    return LARGEST_FLOAT if LARGEST_FLOAT < value < math.inf else value


def _lars_apply(
    rule: LarsRule,
    now: Scalars,
    q: float,
    w: Tensor,
    g: Tensor,
    state: list[Tensor],
    last_lr: Tensor | None,
) -> Tensor:
    lr, mu = now.lr, rule.momentum
    d = g + rule.weight_decay * w
    inner = _coefficient({"step": lr * q, "scaled": q, "gradient": 1.0}[rule.buffer])
    outer = _coefficient({"step": 1.0, "scaled": lr, "gradient": lr * q}[rule.buffer])
    s = inner * d
    if not state:
        return w - outer * s
    last = float(last_lr) if last_lr is not None else 0.0
    stepped_before = last != rule.NEVER_STEPPED
    correction = 1.0
    if rule.momentum_correction and stepped_before and last != 0.0:
        assert last_lr is not None
        # Rounded as the last one was: a rate that did not change corrects nothing.
        correction = float(last_lr.new_tensor(lr)) / last
    undamped = 1.0 - rule.dampening if stepped_before else 1.0
    b = mu * correction * state[0].to(w.dtype) + undamped * s
    state[0].copy_(b)
    return w - outer * (s + mu * b if rule.nesterov else b)


def _lamb_moments(rule: LambRule, w: Tensor, g: Tensor, state: list[Tensor]) -> None:
    m, v = (x.to(w.dtype) for x in state)
    d = g + rule.weight_decay * w if rule.decay == "gradient" and rule.weight_decay else g
    m = rule.beta1 * m + (1.0 - rule.beta1 if rule.grad_averaging else 1.0) * d
    v = rule.beta2 * v + (1.0 - rule.beta2) * d.square()
    state[0].copy_(m)
    state[1].copy_(v)


def _lamb_direction(rule: LambRule, step: float, w: Tensor, state: list[Tensor]) -> Tensor:
    m, v = (x.to(w.dtype) for x in state)
    if rule.bias_correction == "moments":
        m = m / (1.0 - rule.beta1**step)
        v = v / (1.0 - rule.beta2**step)
    r = m / (v.sqrt() + rule.eps)
    return r + rule.weight_decay * w if rule.decay == "update" and rule.weight_decay else r


def _lamb_apply(
    rule: LambRule, now: Scalars, q: float, w: Tensor, state: list[Tensor], step: float
) -> Tensor:
    lr = now.lr
    if rule.bias_correction == "rate":
        lr = lr / (1.0 - rule.beta1**step)
    u = _lamb_direction(rule, step, w, state)
    if rule.decay == "decoupled":
        w = (1.0 - now.lr * rule.weight_decay) * w
    return w - _coefficient(lr * q) * u


def _rmsprop_warmup_apply(
    rule: RmspropWarmupRule, now: Scalars, w: Tensor, g: Tensor, state: list[Tensor], step: float
) -> Tensor:
    share = rule.sgd_share(step - 1.0)
    b, m = (x.to(w.dtype) for x in state)
    d = g + rule.weight_decay * w
    update = share * d
    if share < 1.0:
        m = rule.square_decay * m + (1.0 - rule.square_decay) * d.square()
        state[1].copy_(m)
        r = (1.0 - share) * rule.lr_rmsprop / now.lr if now.lr > 0.0 else 0.0
        update = update + _coefficient(r) * (d / (m.sqrt() + rule.eps))
    b = rule.momentum * b + update
    state[0].copy_(b)
    return w - now.lr * b


def _stochastically(value: Tensor, seed: int, tensor: int) -> Tensor:
    """float32 to bfloat16, up with the probability of the bits that are cut off."""
    generator = torch.Generator("cpu").manual_seed((seed + 0x9E3779B9 * tensor) % 2**63)
    shape = value.shape
    random = torch.randint(2**16, shape, generator=generator, dtype=torch.int32, device="cpu")
    bits = value.view(torch.int32)
    rounded = ((bits + random.to(value.device)) & -(2**16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


class Reference:
    """Plain torch, a tensor at a time."""

    name = "reference"
    reads_device = False

    def layout(self, weights: list[Tensor]) -> list[tuple[torch.Size, torch.device]]:
        return [(w.shape, w.device) for w in weights]

    def bind(self, tensors: Tensors, layout: list[tuple[torch.Size, torch.device]]) -> Tensors:
        kinds = tensors.kinds
        lists: list[tuple[str, list[Tensor], Any]] = [
            ("weights", tensors.weights, kinds.weight),
            ("grads", tensors.grads, kinds.grad),
            *(("states", state, kinds.state) for state in tensors.states),
        ]
        if tensors.copies is not None:
            lists.append(("copies", tensors.copies, kinds.copy))
        for name, values, dtype in lists:
            for i, (value, (shape, device)) in enumerate(zip(values, layout, strict=True)):
                if value.dtype != dtype:
                    raise Mismatch(name, i, "dtype")
                if value.shape != shape:
                    raise Mismatch(name, i, "shape")
                if value.device != device:
                    raise Mismatch(name, i, "device")
        return tensors

    def _each(
        self, tensors: Tensors, now: Scalars
    ) -> Iterator[tuple[int, Tensor, Tensor, list[Tensor]]]:
        dtype = _arithmetic(tensors.kinds.weight)
        for i, (w, g) in enumerate(zip(tensors.weights, tensors.grads, strict=True)):
            state = [states[i] for states in tensors.states]
            yield i, w.to(dtype), now.gradient_scale * g.to(dtype), state

    def measure(self, rule: Rule | GradientNorm, bound: Tensors, now: Scalars) -> Tensor:
        sums = []
        for i, w, g, state in self._each(bound, now):
            if isinstance(rule, GradientNorm):
                sums.append((0.0, _sum_of_squares(g)))
                continue
            u = g
            if isinstance(rule, LambRule):
                assert bound.counters is not None
                bound.counters[i] += 1.0
                _lamb_moments(rule, w, g, state)
                u = _lamb_direction(rule, float(bound.counters[i]), w, state)
            elif isinstance(rule, LarsRule) and rule.ratio == "combined":
                u = g + rule.weight_decay * w
            sums.append((_sum_of_squares(w), _sum_of_squares(u)))
        return torch.tensor(sums, dtype=torch.float64, device="cpu").reshape(len(sums), 2)

    def apply(self, rule: Rule, bound: Tensors, now: Scalars, sums: Tensor | None) -> Tensor:
        ratios = []
        for i, w, g, state in self._each(bound, now):
            q = 1.0 if sums is None else trust_ratio(rule, now, *sums[i].tolist())
            counter = bound.counters[i] if bound.counters is not None else None
            if isinstance(rule, LarsRule):
                new = _lars_apply(rule, now, q, w, g, state, counter)
                if counter is not None:
                    counter.fill_(now.lr)
            elif isinstance(rule, RmspropWarmupRule):
                assert counter is not None
                counter += 1.0
                new = _rmsprop_warmup_apply(rule, now, w, g, state, float(counter))
            else:
                assert counter is not None
                if sums is None:
                    counter += 1.0
                    _lamb_moments(rule, w, g, state)
                new = _lamb_apply(rule, now, q, w, state, float(counter))
            self._store(bound, i, new, now.seed)
            ratios.append(q)
        return torch.tensor(ratios, dtype=torch.float32, device="cpu")

    def _store(self, bound: Tensors, i: int, new: Tensor, seed: int | None) -> None:
        weight = bound.weights[i]
        if seed is not None and weight.dtype == torch.bfloat16:
            new = _stochastically(new, seed, i)
        weight.copy_(new)
        if bound.copies is not None:
            bound.copies[i].copy_(new)

    def step(self, rule: Rule, bound: Tensors, now: Scalars) -> Tensor:
        sums = self.measure(rule, bound, now) if rule.adapt else None
        return self.apply(rule, bound, now, sums)
