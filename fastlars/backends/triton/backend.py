"""The Triton back end: launches on the current stream. The host never waits for the device."""

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
from fastlars.backends.triton.common import rule_argument
from fastlars.backends.triton.memory import Types
from fastlars.backends.triton.table import AddressTable, ChunkTables
from fastlars.backends.upload import Uploader, device_guard, is_capturing
from fastlars.rules import GradientNorm, Rule

LANES = 128  # numbers that a program of `sums.total` and `sums.advance` works on at once
# Without fused multiply-add, which rounds once where other back ends round twice.
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
# For kernels that work on a few numbers per tensor and not on its elements.
SMALL_OPTIONS: dict[str, Any] = {**OPTIONS, "num_warps": 1}
DTYPES = {
    torch.float32: tl.constexpr(tl.float32),
    torch.bfloat16: tl.constexpr(tl.bfloat16),
    torch.float16: tl.constexpr(tl.float16),
}


@lru_cache
def kernels(name: str) -> tuple[Any, dict[str, Any]]:
    """The module that is named after the rule, and the launch options of its kernels."""
    module = import_module(f"{__package__}.{name}")
    return module, {**OPTIONS, **getattr(module, "OPTIONS", {})}


@lru_cache
def types_of(dtypes: Dtypes, has_states: bool, rounds: bool) -> Types:
    """The types as one kernel argument. ``rounds``: a seed for stochastic rounding is given."""
    return Types(
        weight=DTYPES[dtypes.weight],
        grad=DTYPES[dtypes.grad],
        state=DTYPES[dtypes.state] if has_states else None,
        copy=None if dtypes.copy is None else DTYPES[dtypes.copy],
        stochastic_rounding=tl.constexpr(
            rounds and dtypes.weight == torch.bfloat16 and dtypes.copy is None
        ),
    )


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: slow, but CPU tensors can be stepped."""
    return isinstance(sums.total, InterpretedFunction)


@dataclass(frozen=True)
class TritonLayout:
    """What weights of given shapes need at every step; it outlives the tensors of one step."""

    expected: Any  # fastlars._C.Layout: what `bind` compares tensors with
    uploader: Uploader
    chunks: ChunkTables
    addresses: AddressTable


@dataclass(frozen=True)
class TritonBoundTensors:
    """Checked tensors, and the tables of their chunks and addresses on the device."""

    chunks: ChunkTables
    table: Tensor  # of addresses
    tensors: Tensors

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.chunks.device)

    def arguments(
        self, rule: Rule | GradientNorm, scalars: StepScalars, rounds: bool
    ) -> dict[str, Any]:
        """The arguments that the kernels ``measure`` and ``apply`` of every rule share."""
        return {
            "table": self.table,
            "numel": self.chunks.numel,
            "chunks": self.chunks.entries,
            "device_scalars": scalars.doubles,
            "lr": scalars.lr,
            "gradient_scale": scalars.gradient_scale,
            "rule": rule_argument(rule),
            "types": types_of(self.tensors.dtypes, bool(self.tensors.states), rounds),
        }


class Triton:
    """float32, bfloat16 and float16 weights and gradients in any mix; float32 or bfloat16 states.

    For any number of tensors, ``measure`` takes two launches, and ``apply`` takes one, or two if
    it advances counters. Sums of squares have the same bits in every run.
    """

    name = "triton"
    reads_device = True

    def __init__(self) -> None:
        self._checker = cpu.Cpu()

    def layout(self, weights: list[Tensor]) -> TritonLayout:
        uploader = Uploader(weights)
        expected = self._checker.layout(weights)
        chunks = ChunkTables(weights, uploader)
        return TritonLayout(expected, uploader, chunks, AddressTable(len(weights), uploader))

    def bind(self, tensors: Tensors, layout: TritonLayout) -> TritonBoundTensors:
        tensor_list = self._checker.bind(tensors, layout.expected).tensor_list
        if is_capturing(layout.chunks.device):
            layout.uploader.read_at_replay.append(layout.chunks)
        return TritonBoundTensors(layout.chunks, layout.addresses.get(tensor_list), tensors)

    def measure(
        self, rule: Rule | GradientNorm, bound: TritonBoundTensors, scalars: StepScalars
    ) -> Tensor:
        chunks = bound.chunks
        module, options = kernels(rule.name)
        found = bound.empty(chunks.tensor_count, rule.sums, dtype=torch.float64)
        slots = bound.empty(chunks.chunk_count, rule.sums, dtype=torch.float64)
        with device_guard(chunks.device):
            module.measure[(chunks.chunk_count,)](
                **bound.arguments(rule, scalars, rounds=False), slots=slots, **options
            )
            sums.total[(chunks.tensor_count, rule.sums)](
                bound.table,
                chunks.first_chunk,
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

    def apply(
        self, rule: Rule, bound: TritonBoundTensors, scalars: StepScalars, sums: Tensor | None
    ) -> Tensor:
        chunks = bound.chunks
        module, options = kernels(rule.name)
        ratios = bound.empty(chunks.tensor_count, dtype=torch.float32)
        sums = checked_sums(rule, sums, len(ratios), ratios.device)
        with device_guard(chunks.device):
            module.apply[(chunks.chunk_count,)](
                **bound.arguments(rule, scalars, rounds=scalars.seed is not None),
                sums=sums,
                ratios=ratios,
                seed=scalars.seed or 0,
                **options,
            )
            if rule.counter is not None and not (rule.measure_writes and rule.adapt):
                _advance(rule, bound, scalars)
        return ratios

    def step(self, rule: Rule, bound: TritonBoundTensors, scalars: StepScalars) -> Tensor:
        return self.apply(
            rule, bound, scalars, self.measure(rule, bound, scalars) if rule.adapt else None
        )


def _advance(rule: Rule, bound: TritonBoundTensors, scalars: StepScalars) -> None:
    """Advance the counters in a separate launch: programs of ``apply`` may still read them."""
    count = bound.chunks.tensor_count
    sums.advance[((count + LANES - 1) // LANES,)](
        bound.table,
        count,
        scalars.doubles,
        scalars.lr,
        COUNTS_STEPS=rule.counts_steps,
        LANES=LANES,
        **SMALL_OPTIONS,
    )
