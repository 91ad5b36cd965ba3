"""What is benchmarked on the CPU: models, sizes and types, and who steps them in each.

The loops in Python take seconds for thousands of tensors and gigabytes for large ones: they run on
the two models that people know.
"""

from __future__ import annotations

import math

import gpu_cases
from cases import RULES, Contender
from shapes import MODELS, SWEEP, Shapes

PEERS = ("resnet50", "bert_large")


class Case(gpu_cases.Case):
    """A model or a list of tensors, stepped by one rule."""

    def shapes(self) -> Shapes:
        return (MODELS | SWEEP)[self.model]()

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(map(math.prod, self.shapes()))

    def needed_bytes(self) -> int:
        """Memory in use when two optimizers take turns: weights, gradients twice, their states."""
        widths, states = self.widths, 1 if self.rule == "lars" else 2
        masters = 2 * 4 if widths.copy else 0
        # PyTorch's fused optimizers take masters' gradients in float32.
        casts = 4 if widths.copy else 0
        each = widths.weight + 2 * widths.grad + 2 * 4 * states + masters + casts
        return self.numel * each


def contenders(case: Case) -> dict[str, Contender]:
    """Who steps a case, fastlars first: the others are compared with it."""
    if case.dtype == "bf16":
        found = gpu_cases.contenders(case)
        return {name: c for name, c in found.items() if c.backend is None and not c.graph}
    rule = RULES[case.rule]
    if case.model in PEERS:
        return rule
    return {name: c for name, c in rule.items() if c.package in ("fastlars", "torch")}


def free_bytes() -> int:
    """Memory that can be had without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024


_RATIOS = ("lars", "lamb")
CASES = [
    *(Case(model, rule, "float32") for model in MODELS for rule in _RATIOS),
    *(Case(model, rule, "bf16") for model in PEERS for rule in _RATIOS),
    *(Case(size, rule, "float32") for size in SWEEP for rule in _RATIOS),
    *(Case("resnet50", rule, "float32") for rule in RULES if rule not in _RATIOS),
    Case("bert_large", "lans", "float32"),
]
