"""What a step reports of each tensor: its trust ratio, and the norms that the ratio is made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastlars
from backend_cases import F32, F64, NAMES, PLAIN
from fastlars.backends.base import StepScalars, Tensors
from fastlars.backends.choose import instance
from fastlars.rules import RULES, LambRule, LansRule, LarsRule, RmspropWarmupRule, Rule
from tolerances import assert_close, assert_same_bits

DECAY, EPS, SCALE = 0.5, 0.1, -0.25
RATIOS = (
    LarsRule(weight_decay=DECAY),
    LarsRule(weight_decay=DECAY, ratio="combined"),
    # The norm of the weights is that before any decay.
    LambRule(weight_decay=DECAY, eps=EPS, decay="decoupled"),
    # Without correction the first directions of the momentum and of the gradient differ.
    LansRule(weight_decay=DECAY, eps=EPS, bias_correction=False),
)
# Elements of each tensor. 20,001: several chunks of every back end.
SIZES = (20_001, 0, 3)


def _tensors(rule: Rule) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def drawn() -> list[Tensor]:
        return [torch.randn(size, generator=generator) for size in SIZES]

    weights = drawn()
    states = tuple([torch.zeros_like(w) for w in weights] for _ in rule.states)
    counters = [torch.tensor(rule.NEVER_STEPPED) for _ in weights] if rule.counter else None
    return Tensors(weights, drawn(), states, counters, None, PLAIN)


def _norms(rule: Rule, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """By name, the norms of a first step in float64."""
    w, g = weight.double(), SCALE * grad.double()
    if isinstance(rule, LarsRule):
        return {"weight": w, "gradient": g + DECAY * w if rule.ratio == "combined" else g}
    if isinstance(rule, LambRule):
        return {"weight": w, "update": g / (g.abs() + EPS)}
    assert isinstance(rule, LansRule)
    g = g / g.norm() if g.numel() else g
    m, d = (1.0 - rule.beta1) * g, math.sqrt(1.0 - rule.beta2) * g.abs() + EPS
    return {"weight": w, "momentum": m / d + DECAY * w, "gradient": g / d + DECAY * w}


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    "rule", RATIOS, ids=lambda rule: f"{rule.title} {getattr(rule, 'ratio', '')}"
)
def test_norms_are_those_of_float64(backend: str, rule: Rule) -> None:
    chosen, now = instance(backend), StepScalars(lr=0.1, gradient_scale=SCALE)
    reports = []
    for at_once in (True, False):
        tensors = _tensors(rule)
        pairs = zip(tensors.weights, tensors.grads, strict=True)
        found = [_norms(rule, weight, grad) for weight, grad in pairs]
        bound = chosen.bind(tensors, chosen.layout(tensors.weights))
        if at_once:
            reports.append(chosen.step(rule, bound, now))
        else:
            reports.append(chosen.apply(rule, bound, now, chosen.measure(rule, bound, now)))
    assert reports[0].dtype == F32
    assert_same_bits("step, and measure with apply", *reports)
    assert {tuple(each) for each in found} == {rule.norms}
    norms = torch.tensor([[float(x.norm()) for x in each.values()] for each in found], dtype=F64)
    assert_close("norms", "ratio", reports[0][:, 1:], norms)
    # The second tensor is empty.
    assert reports[0][1].tolist() == [1.0, *[0.0] * rule.sums]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    "rule",
    [*(kind(adapt=False) for kind in (LarsRule, LambRule, LansRule)), RmspropWarmupRule.usual()],
    ids=lambda rule: rule.name,
)
def test_without_adaptation_there_are_no_norms(backend: str, rule: Rule) -> None:
    chosen, tensors = instance(backend), _tensors(rule)
    bound = chosen.bind(tensors, chosen.layout(tensors.weights))
    report = chosen.step(rule, bound, StepScalars(lr=0.1))
    expected = torch.full((len(SIZES), 1 + len(rule.norms)), math.nan)
    expected[:, 0] = 1.0
    assert_same_bits("report", report, expected)


def test_norms_have_names() -> None:
    assert {kind.title: kind.norms for kind in RULES} == {
        "LARS": ("weight", "gradient"),
        "LAMB": ("weight", "update"),
        "LANS": ("weight", "momentum", "gradient"),
        "RMSprop warm-up": (),
    }


@pytest.mark.skipif(NAMES != ("cpu", "reference"), reason="optimizers choose a back end themselves")
def test_an_optimizer_keeps_the_report_of_each_batch() -> None:
    params = [torch.nn.Parameter(w) for w in (torch.full((4,), 2.0), torch.ones(9), torch.ones(1))]
    groups = [{"params": params[:2]}, {"params": params[2:], "adapt": False}]
    optimizer = fastlars.LARS(groups, lr=0.1, trust_coefficient=0.5)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    first, second = optimizer.stepper.results
    assert [p is q for p, q in zip(first.params + second.params, params, strict=True)] == [True] * 3
    assert first.rule.adapt
    assert not second.rule.adapt
    assert first.report.tolist() == [[2.0, 4.0, 1.0], [1.0, 3.0, 1.5]]
    assert second.report.isnan().tolist() == [[False, True, True]]
    assert optimizer.trust_ratios() == {params[0]: 2.0, params[1]: 1.0, params[2]: 1.0}
