"""The Triton back end: launches on the current stream. The host never waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastlars.backends import cpu
from fastlars.backends.base import Dtypes, StepScalars, Tensors, checked_sums
from fastlars.backends.triton import sums
from fastlars.backends.triton.common import rule_argument, rule_options
from fastlars.backends.triton.launch import Launcher
from fastlars.backends.triton.memory import Types
from fastlars.backends.triton.table import DeviceTables, Workspace
from fastlars.backends.upload import Uploader, device_guard
from fastlars.rules import GradientNorm, Rule

LANES = 1024  # numbers that `sums_of` adds at once
# Without fused multiply-add, which rounds once where other back ends round twice.
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
# For kernels that work on a few numbers per tensor and not on its elements. Every thread computes
# the coefficients, so more warps would do more of the slow operations in float64.
SMALL_OPTIONS: dict[str, Any] = {**OPTIONS, "num_warps": 1}
DTYPES = {
    torch.float32: tl.constexpr(tl.float32),
    torch.bfloat16: tl.constexpr(tl.bfloat16),
    torch.float16: tl.constexpr(tl.float16),
}


@lru_cache
def kernels(name: str) -> tuple[Any, dict[str, Any]]:
    """The module that is named after the rule, and the launch options of its chunk kernels."""
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


@dataclass(frozen=True)
class TritonLayout:
    """What weights of given shapes need at every step; it outlives the tensors of one step."""

    expected: Any  # fastlars._C.Layout: what `bind` compares tensors with
    tables: DeviceTables
    launch: Launcher


@dataclass(frozen=True)
class TritonBoundTensors:
    """Checked tensors, and the tables of their chunks and addresses on the device."""

    layout: TritonLayout
    workspace: Workspace
    tensors: Tensors

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.layout.tables.device)


class Triton:
    """float32, bfloat16 and float16 weights and gradients in any mix; float32 or bfloat16 states.

    For any number of tensors, ``step`` takes three launches for LARS, four for LAMB, and two for a
    rule that does not adapt. Sums of squares have the same bits in every run.
    """

    name = "triton"
    reads_device = True

    def __init__(self) -> None:
        self._checker = cpu.Cpu()

    def layout(self, weights: list[Tensor]) -> TritonLayout:
        tables = DeviceTables(weights, Uploader(weights))
        return TritonLayout(self._checker.layout(weights), tables, Launcher())

    def bind(self, tensors: Tensors, layout: TritonLayout) -> TritonBoundTensors:
        tensor_list = self._checker.bind(tensors, layout.expected).tensor_list
        return TritonBoundTensors(layout, layout.tables.get(tensor_list), tensors)

    def measure(
        self, rule: Rule | GradientNorm, bound: TritonBoundTensors, scalars: StepScalars
    ) -> Tensor:
        tables = bound.layout.tables
        found = bound.empty(tables.tensor_count, rule.sums, dtype=torch.float64)
        with device_guard(tables.device):
            self._measure_chunks(rule, bound, scalars)
            bound.layout.launch(
                sums.total,
                tables.tensor_count,
                rule.sums,
                SMALL_OPTIONS,
                (bound.workspace.first_chunk, bound.workspace.slots, found, rule.sums, LANES),
            )
        return found

    def _measure_chunks(
        self, rule: Rule | GradientNorm, bound: TritonBoundTensors, scalars: StepScalars
    ) -> None:
        """Store the sums of each chunk in ``slots``. A rule whose measure writes counts the step,
        and advances its states."""
        module, options = kernels(rule.name)
        types = types_of(bound.tensors.dtypes, bool(bound.tensors.states), False)
        given = bound.workspace
        if rule.measure_writes:
            self._prepare(rule, bound, scalars, None, None)
            key: Any = types
            arguments: tuple[Any, ...] = (
                given.table,
                given.sizes,
                given.chunks,
                given.coefficients,
                given.slots,
            )
        else:
            doubles = scalars.doubles
            key = types, rule_options(rule), doubles is None
            arguments = (
                *(given.table, given.numel, given.chunks, given.slots, doubles),
                *(scalars.lr, scalars.gradient_scale, rule_argument(rule)),
            )
        count = bound.layout.tables.chunk_count
        bound.layout.launch(module.measure, count, key, options, (*arguments, types))

    def _prepare(
        self,
        rule: Rule | GradientNorm,
        bound: TritonBoundTensors,
        scalars: StepScalars,
        slots: Tensor | None,
        sums: Tensor | None,
    ) -> Tensor:
        """Store the coefficients of each tensor; return the trust ratios, which the sums give: in
        ``slots`` those of the chunks, in ``sums`` those of the tensors."""
        module, _ = kernels(rule.name)
        given, doubles, count = bound.workspace, scalars.doubles, bound.layout.tables.tensor_count
        ratios = bound.empty(count, dtype=torch.float32)
        bound.layout.launch(
            module.prepare,
            count,
            (rule_options(rule), doubles is None, slots is None, sums is None),
            SMALL_OPTIONS,
            (
                *(given.table, given.numel, given.first_chunk, slots, sums, ratios),
                *(given.sizes, given.coefficients, doubles, scalars.lr, scalars.gradient_scale),
                *(rule_argument(rule), LANES),
            ),
        )
        return ratios

    def _apply_chunks(self, rule: Rule, bound: TritonBoundTensors, scalars: StepScalars) -> None:
        module, options = kernels(rule.name)
        rounds = scalars.seed is not None
        types = types_of(bound.tensors.dtypes, bool(bound.tensors.states), rounds)
        given = bound.workspace
        bound.layout.launch(
            module.apply,
            bound.layout.tables.chunk_count,
            (types, rule_options(rule)),
            options,
            (
                *(given.table, given.sizes, given.chunks, given.coefficients),
                *(scalars.seed or 0, rule_argument(rule), types),
            ),
        )

    def apply(
        self, rule: Rule, bound: TritonBoundTensors, scalars: StepScalars, sums: Tensor | None
    ) -> Tensor:
        tables = bound.layout.tables
        sums = checked_sums(rule, sums, tables.tensor_count, tables.device)
        with device_guard(tables.device):
            ratios = self._prepare(rule, bound, scalars, None, sums)
            self._apply_chunks(rule, bound, scalars)
        return ratios

    def step(self, rule: Rule, bound: TritonBoundTensors, scalars: StepScalars) -> Tensor:
        if not rule.adapt:
            return self.apply(rule, bound, scalars, None)
        with device_guard(bound.layout.tables.device):
            self._measure_chunks(rule, bound, scalars)
            ratios = self._prepare(rule, bound, scalars, bound.workspace.slots, None)
            self._apply_chunks(rule, bound, scalars)
        return ratios
