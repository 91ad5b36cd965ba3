"""The Triton back end: launches over tables on the device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastlars.backends import cpu
from fastlars.backends.base import Dtypes, StepScalars, Tensors, checked_sums
from fastlars.backends.triton import sums
from fastlars.backends.triton.common import argument
from fastlars.backends.triton.memory import Types
from fastlars.backends.triton.table import Addresses, Chunks
from fastlars.backends.upload import Sender, current, is_capturing
from fastlars.rules import GradientNorm, Rule

LANES = 128
# Fused multiply-adds round once where other back ends round twice.
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
# For the kernels over tensors rather than elements.
SMALL_OPTIONS: dict[str, Any] = {**OPTIONS, "num_warps": 1}
DTYPES = {
    torch.float32: tl.constexpr(tl.float32),
    torch.bfloat16: tl.constexpr(tl.bfloat16),
    torch.float16: tl.constexpr(tl.float16),
}


@lru_cache
def kernels(name: str) -> tuple[Any, dict[str, Any]]:
    """The module of the rule of that name, and the options to launch its kernels with."""
    module = import_module(f"{__package__}.{name}")
    return module, {**OPTIONS, **getattr(module, "OPTIONS", {})}


@lru_cache
def types_of(dtypes: Dtypes, has_states: bool, rounds: bool) -> Types:
    """The types as one argument of a kernel. ``rounds``: a seed of stochastic rounding is given."""
    return Types(
        weight=DTYPES[dtypes.weight],
        grad=DTYPES[dtypes.grad],
        state=DTYPES[dtypes.state] if has_states else None,
        copy=None if dtypes.copy is None else DTYPES[dtypes.copy],
        stochastic_rounding=tl.constexpr(
            rounds and dtypes.weight == torch.bfloat16 and dtypes.copy is None
        ),
    )


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which also serves CPU tensors, slowly."""
    return isinstance(sums.total, InterpretedFunction)


@dataclass(frozen=True)
class Layout:
    """What weights of given shapes need for every step."""

    checked: Any  # fastlars._C.Layout
    sender: Sender
    chunks: Chunks
    addresses: Addresses


@dataclass(frozen=True)
class Bound:
    """Addresses on the device, and the tensors that own them."""

    chunks: Chunks
    table: Tensor
    tensors: Tensors

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.chunks.device)

    def arguments(
        self, rule: Rule | GradientNorm, scalars: StepScalars, rounds: bool
    ) -> dict[str, Any]:
        """What ``measure`` and ``apply`` of every rule take."""
        return {
            "table": self.table,
            "numel": self.chunks.numel,
            "chunks": self.chunks.chunk,
            "device_scalars": scalars.doubles,
            "lr": scalars.lr,
            "gradient_scale": scalars.gradient_scale,
            "rule": argument(rule),
            "types": types_of(self.tensors.dtypes, bool(self.tensors.states), rounds),
        }


class Triton:
    """float32, bfloat16 and float16 weights and gradients in any mix; float32 or bfloat16 states.

    ``measure`` takes two launches, ``apply`` one, and one more where a counter is left to advance,
    whatever the number of tensors. Sums of squares have the same bits from run to run.
    """

    name = "triton"
    reads_device = True

    def __init__(self) -> None:
        self._checks = cpu.Cpu()

    def layout(self, weights: list[Tensor]) -> Layout:
        sender = Sender(weights)
        checked = self._checks.layout(weights)
        chunks = Chunks(weights, sender)
        return Layout(checked, sender, chunks, Addresses(len(weights), sender))

    def bind(self, tensors: Tensors, layout: Layout) -> Bound:
        checked = self._checks.bind(tensors, layout.checked)
        if is_capturing(layout.chunks.device):
            layout.sender.recorded.append(layout.chunks)
        return Bound(layout.chunks, layout.addresses.table(checked.native), tensors)

    def measure(self, rule: Rule | GradientNorm, bound: Bound, scalars: StepScalars) -> Tensor:
        chunks = bound.chunks
        module, options = kernels(rule.name)
        found = bound.empty(chunks.tensors, rule.sums, dtype=torch.float64)
        slots = bound.empty(chunks.count, rule.sums, dtype=torch.float64)
        with current(chunks.device):
            module.measure[(chunks.count,)](
                **bound.arguments(rule, scalars, rounds=False), slots=slots, **options
            )
            sums.total[(chunks.tensors, rule.sums)](
                bound.table,
                chunks.first,
                slots,
                found,
                scalars.doubles,
                scalars.lr,
                COUNT=rule.sums,
                ADVANCES=rule.measure_writes,
                COUNTS_STEPS=rule.counts_steps,
                LANES=LANES,
                **SMALL_OPTIONS,
            )
        return found

    def apply(self, rule: Rule, bound: Bound, scalars: StepScalars, sums: Tensor | None) -> Tensor:
        chunks = bound.chunks
        module, options = kernels(rule.name)
        ratios = bound.empty(chunks.tensors, dtype=torch.float32)
        sums = checked_sums(rule, sums, len(ratios), ratios.device)
        with current(chunks.device):
            module.apply[(chunks.count,)](
                **bound.arguments(rule, scalars, rounds=scalars.seed is not None),
                sums=sums,
                ratios=ratios,
                seed=scalars.seed or 0,
                **options,
            )
            if rule.counter is not None and not (rule.measure_writes and rule.adapt):
                _advance(rule, bound, scalars)
        return ratios

    def step(self, rule: Rule, bound: Bound, scalars: StepScalars) -> Tensor:
        return self.apply(
            rule, bound, scalars, self.measure(rule, bound, scalars) if rule.adapt else None
        )


def _advance(rule: Rule, bound: Bound, scalars: StepScalars) -> None:
    """In a launch of its own: programs of the last one may still read the counters."""
    tensors = bound.chunks.tensors
    sums.advance[((tensors + LANES - 1) // LANES,)](
        bound.table,
        tensors,
        scalars.doubles,
        scalars.lr,
        COUNTS_STEPS=rule.counts_steps,
        LANES=LANES,
        **SMALL_OPTIONS,
    )
