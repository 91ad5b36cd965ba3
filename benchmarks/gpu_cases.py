"""What is benchmarked on a GPU: models, types, and who steps them in each.

Not everything everywhere: the loops take seconds for thousands of tensors, torch.compile minutes,
and all of it together is to take less than four.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

import fastlars
import foreach
from cases import DECAY, LR, RULES, Build, Contender, adamw, sgd
from shapes import MODELS, Shapes
from traffic import FLOAT32, MASTERS, Widths

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A model, stepped by one rule; in bfloat16 with float32 masters and states."""

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
        return MODELS[self.model]()


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


def contenders(case: Case) -> dict[str, Contender]:
    """Who steps a case, fastlars as it comes first: the others are compared with it."""
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
    if case.model in ("resnet50", "bert_large"):
        found |= others
        if case.rule == "lamb":
            found["apex FusedLAMB"] = Contender(_apex, "apex")
    if case.model == "resnet50" and case.rule != "lans":
        rule = foreach.lars if case.rule == "lars" else foreach.lamb
        found["torch.compile of foreach"] = Contender(_compiled(rule), "torch", exact=True)
        recorded = replace(ours, build=fastlars_of(case, capturable=True), graph=True)
        found["fastlars, CUDA graph"] = recorded
    return found


# Those of the targets in docs/performance.md.
TARGETS = [Case("resnet50", "lars", "float32"), Case("bert_large", "lamb", "float32")]
CASES = [
    *(Case(m, r, d) for m in MODELS for r in ("lars", "lamb") for d in DTYPES),
    *(Case("bert_large", "lans", d) for d in DTYPES),
]
