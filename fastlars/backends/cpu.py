"""The compiled CPU back end: csrc/cpu through fastlars._C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends.base import Mismatch, StepScalars, Tensors, checked_sums
from fastlars.rules import GradientNorm, Rule

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATE_DTYPES = (torch.float32, torch.bfloat16)
DISPATCH = Tensor.__torch_dispatch__


@lru_cache(maxsize=1024)  # a schedule of momentum or weight decay makes a new rule every step
def native(rule: Rule | GradientNorm) -> Any:
    """The rule as the C++ struct of the same name."""
    return getattr(_C, type(rule).__name__)(**rule.constants)


@cache
def viewer() -> Any:
    """Looks at tensors of torch's own two types; a subclass is accepted once a layout holds it."""
    return _C.Viewer(Tensor, [Tensor, torch.nn.Parameter])


@dataclass(frozen=True)
class Bound:
    """Addresses, and the tensors that own them."""

    native: Any
    tensors: Tensors


class Cpu:
    """float32, bfloat16 and float16 weights and gradients in any mix; float32 or bfloat16 states.

    Sums of squares have the same bits for any number of threads, and from run to run.
    """

    name = "cpu"
    reads_device = False

    def layout(self, weights: list[Tensor]) -> Any:
        for kind in set(map(type, weights)):
            viewer().accept(kind)
        return _C.Layout(viewer(), weights)

    def bind(self, tensors: Tensors, layout: Any) -> Bound:
        try:
            return Bound(self._addresses(tensors, layout), tensors)
        except Mismatch as mismatch:
            # Subclasses may keep their elements elsewhere, unless they leave the dispatcher alone.
            types = set(map(type, tensors.grads))
            known = all(getattr(t, "__torch_dispatch__", None) is DISPATCH for t in types)
            if mismatch.args[0] != "grads" or mismatch.args[2] != "type" or not known:
                raise
            for kind in types:
                viewer().accept(kind)
        return Bound(self._addresses(tensors, layout), tensors)

    def _addresses(self, tensors: Tensors, layout: Any) -> Any:
        dtypes = tensors.dtypes
        return _C.bind(
            layout,
            tensors.weights,
            tensors.grads,
            tensors.states,
            tensors.copies,
            tensors.counters,
            DTYPES[dtypes.weight],
            DTYPES[dtypes.grad],
            DTYPES[dtypes.state],
            DTYPES[dtypes.copy] if dtypes.copy is not None else 0,
        )

    def measure(self, rule: Rule | GradientNorm, bound: Bound, scalars: StepScalars) -> Tensor:
        shape = len(bound.tensors.weights), rule.sums
        sums = torch.empty(shape, dtype=torch.float64, device="cpu")
        _C.cpu_measure(
            native(rule), bound.native, scalars.lr, scalars.gradient_scale, sums.data_ptr()
        )
        return sums

    def apply(self, rule: Rule, bound: Bound, scalars: StepScalars, sums: Tensor | None) -> Tensor:
        ratios = torch.empty(len(bound.tensors.weights), dtype=torch.float32, device="cpu")
        sums = checked_sums(rule, sums, len(ratios), ratios.device)
        _C.cpu_apply(
            native(rule),
            bound.native,
            scalars.lr,
            scalars.gradient_scale,
            scalars.seed,
            0 if sums is None else sums.data_ptr(),
            ratios.data_ptr(),
        )
        return ratios

    def step(self, rule: Rule, bound: Bound, scalars: StepScalars) -> Tensor:
        ratios = torch.empty(len(bound.tensors.weights), dtype=torch.float32, device="cpu")
        _C.cpu_step(
            native(rule),
            bound.native,
            scalars.lr,
            scalars.gradient_scale,
            scalars.seed,
            ratios.data_ptr(),
        )
        return ratios


instruction_set: Callable[[], str] = _C.instruction_set
