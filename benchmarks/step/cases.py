"""The cases of the benchmarks, and the contenders of each, on a CPU and on a GPU.

A case is a model or a list of tensors, stepped by one rule. Not every contender steps every case:
loops in Python take seconds for thousands of tensors, torch.compile takes minutes, and all cases
of a GPU together must take less than four minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

import fastlars
from benchmarks.models import SHAPES, SWEEP, Shapes
from benchmarks.step import foreach
from benchmarks.step.contenders import DECAY, LR, RULES, Build, Contender, adamw, sgd
from benchmarks.step.traffic import FLOAT32, MASTERS, Widths

# The loops in Python, which take seconds for thousands of tensors, step these models alone.
PEERS = ("resnet50", "bert_large")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A model or a list of tensors, stepped by one rule; bf16 has float32 masters and states."""

    model: str
    rule: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model} {self.rule}" + (" bf16 + masters" if self.dtype == "bf16" else "")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def widths(self) -> Widths:
        return MASTERS if self.dtype == "bf16" else FLOAT32

    def shapes(self) -> Shapes:
        return (SHAPES | SWEEP)[self.model]()

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


class WithMasters:
    """Another optimizer for bfloat16 parameters, with masters as training loops keep them.

    Gradients are cast to float32 before the step and masters to bfloat16 after it, each by one
    foreach copy, which an optimizer that knows of masters does not need.
    """

    def __init__(self, params: list[nn.Parameter], build: Build) -> None:
        self._params = params
        self._masters = [nn.Parameter(p.detach().float()) for p in params]
        for master in self._masters:
            master.grad = torch.empty_like(master)
        self._inner = build(self._masters)
        self.param_groups = self._inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_([m.grad for m in self._masters], [p.grad for p in self._params])
        self._inner.step()
        torch._foreach_copy_(self._params, self._masters)


def _with_masters(build: Build) -> Build:
    return lambda params: WithMasters(params, build)  # type: ignore[return-value]


def fastlars_of(case: Case, *, lr: float = LR, capturable: bool = False) -> Build:
    """fastlars's optimizer for a case."""
    kind = {"lars": fastlars.LARS, "lamb": fastlars.LAMB, "lans": fastlars.LANS}[case.rule]
    masters = case.dtype == "bf16"
    return lambda params: kind(
        params, lr=lr, weight_decay=DECAY, master_weights=masters, capturable=capturable
    )


def _compiled(rule: foreach.Rule) -> Build:
    return lambda params: foreach.Compiled(params, rule, LR, DECAY)


def _apex(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedLAMB

    # Its global clip cannot be turned off; at this norm it changes nothing.
    return FusedLAMB(params, lr=LR, weight_decay=DECAY, max_grad_norm=1e9)


def gpu_contenders(case: Case) -> dict[str, Contender]:
    """Who steps a case on a GPU, fastlars as it comes first: the others are compared with it."""
    ours = Contender(fastlars_of(case), "fastlars", exact=True)
    found = {
        "fastlars": ours,
        "fastlars cuda two-launch": replace(ours, backend="cuda", path="two-launch"),
        "fastlars cuda one-launch": replace(ours, backend="cuda", path="one-launch"),
        "fastlars triton": replace(ours, backend="triton"),
    }
    name, fused = ("SGD", sgd) if case.rule == "lars" else ("AdamW", adamw)
    least = RULES[case.rule]["fastlars"].bytes_per_parameter
    if case.dtype == "bf16":
        build = _with_masters(fused)
        return found | {f"torch {name}(fused) + copies": Contender(build, "torch", least)}
    found[f"torch {name}(fused)"] = Contender(fused, "torch", least)
    others = {
        n: c for n, c in RULES[case.rule].items() if c.package in ("timm", "pytorch_optimizer")
    }
    if case.model in PEERS:
        found |= others
        if case.rule == "lamb":
            found["apex FusedLAMB"] = Contender(_apex, "apex")
    if case.model == "resnet50" and case.rule != "lans":
        rule = foreach.lars if case.rule == "lars" else foreach.lamb
        found["torch.compile of foreach"] = Contender(_compiled(rule), "torch", exact=True)
        recorded = replace(ours, build=fastlars_of(case, capturable=True), graph=True)
        found["fastlars, CUDA graph"] = recorded
    return found


def cpu_contenders(case: Case) -> dict[str, Contender]:
    """Who steps a case on a CPU, fastlars first: the others are compared with it."""
    if case.dtype == "bf16":
        found = gpu_contenders(case)
        return {name: c for name, c in found.items() if c.backend is None and not c.graph}
    rule = RULES[case.rule]
    if case.model in PEERS:
        return rule
    return {name: c for name, c in rule.items() if c.package in ("fastlars", "torch")}


_RATIOS = ("lars", "lamb")
CPU_CASES = [
    *(Case(model, rule, "float32") for model in SHAPES for rule in _RATIOS),
    *(Case(model, rule, "bf16") for model in PEERS for rule in _RATIOS),
    *(Case(size, rule, "float32") for size in SWEEP for rule in _RATIOS),
    *(Case("resnet50", rule, "float32") for rule in RULES if rule not in _RATIOS),
    Case("bert_large", "lans", "float32"),
]
# Those of the targets in docs/performance.md.
TARGETS = [Case("resnet50", "lars", "float32"), Case("bert_large", "lamb", "float32")]
GPU_CASES = [
    *(Case(m, r, d) for m in SHAPES for r in ("lars", "lamb") for d in DTYPES),
    *(Case("bert_large", "lans", d) for d in DTYPES),
]
