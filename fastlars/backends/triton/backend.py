"""The Triton back end: launches on the current stream. The host never waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastlars.backends import cpu
from fastlars.backends.base import (
    Dtypes,
    StepScalars,
    Tensors,
    checked_gradient_sums,
    checked_streams,
    checked_sums,
)
from fastlars.backends.triton import sums
from fastlars.backends.triton.common import rule_argument, rule_options
from fastlars.backends.triton.launch import Launch, Launcher
from fastlars.backends.triton.memory import Types
from fastlars.backends.triton.table import DeviceTables, Workspace
from fastlars.backends.upload import Uploader, device_guard
from fastlars.rules import GradientNorm, Rule

LANES = 1024  # numbers that `sums_of` adds at once
# Without fused multiply-add, which rounds once where other back ends round twice.
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
# For kernels that work on a few numbers per tensor and not on its elements. One warp: every thread
# computes the coefficients, so more would do more of the slow operations in float64. And every
# thread reads the counter before one of them writes it: a second warp could read the new value.
SMALL_OPTIONS: dict[str, Any] = {**OPTIONS, "num_warps": 1}
DTYPES = {
    torch.float32: tl.constexpr(tl.float32),
    torch.bfloat16: tl.constexpr(tl.bfloat16),
    torch.float16: tl.constexpr(tl.float16),
}


class RuleKernels(NamedTuple):
    """A rule's kernels, and what they are launched with.

    Attributes:
        rule: the rule.
        module: the module that is named after it.
        options: launch options of its kernels that work on chunks.
        words: the rule's words and flags, for which kernels are compiled.
        argument: the rule as one kernel argument.
    """

    rule: Rule | GradientNorm
    module: Any
    options: dict[str, Any]
    words: tuple[Any, ...]
    argument: Any


@lru_cache(maxsize=1024)  # a schedule of momentum or weight decay makes a new rule every step
def kernels(rule: Rule | GradientNorm) -> RuleKernels:
    """A rule's kernels."""
    module = import_module(f"{__package__}.{rule.name}")
    options = {**OPTIONS, **getattr(module, "OPTIONS", {})}
    return RuleKernels(rule, module, options, rule_options(rule), rule_argument(rule))


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


class GradientNorms(NamedTuple):
    """Sums of squares of the gradients: those of the chunks, or those of the tensors. Neither for a
    rule that does not normalize gradients."""

    slots: Tensor | None
    sums: Tensor | None


@dataclass(frozen=True)
class TritonLayout:
    """What weights of given shapes need at every step; it outlives the tensors of one step."""

    expected: Any  # fastlars._C.Layout: what `bind` compares tensors with
    tables: DeviceTables
    launcher: Launcher


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

    For any number of tensors, ``step`` takes three launches for LARS, four for LAMB, five for LANS,
    and two for a rule that does not adapt: three if it normalizes gradients. Sums of squares have
    the same bits in every run.
    """

    name = "triton"
    reads_device = True

    def __init__(self) -> None:
        self._checker = cpu.Cpu()

    def layout(self, weights: list[Tensor]) -> TritonLayout:
        tables = DeviceTables(weights, Uploader(weights))
        return TritonLayout(self._checker.layout(weights), tables, Launcher(tables.device))

    def bind(self, tensors: Tensors, layout: TritonLayout) -> TritonBoundTensors:
        tensor_list = self._checker.bind(tensors, layout.expected).tensor_list
        return TritonBoundTensors(layout, layout.tables.get(tensor_list), tensors)

    def measure(
        self, rule: Rule | GradientNorm, bound: TritonBoundTensors, scalars: StepScalars
    ) -> Tensor:
        tables, given = bound.layout.tables, bound.workspace
        found = bound.empty(tables.tensor_count, rule.sums, dtype=torch.float64)
        arguments = (given.first_chunk, given.slots, found, rule.sums, LANES)
        with device_guard(tables.device):
            normalizing, norms = self._gradient_norms(rule, bound, scalars)
            _run(
                *normalizing,
                *self._measure_chunks(kernels(rule), bound, scalars, norms, given.slots),
                bound.layout.launcher(
                    sums.total, tables.tensor_count, rule.sums, SMALL_OPTIONS, arguments
                ),
            )
        return found

    def apply(
        self, rule: Rule, bound: TritonBoundTensors, scalars: StepScalars, sums: Tensor | None
    ) -> Tensor:
        its, tables = kernels(rule), bound.layout.tables
        sums = checked_sums(rule, sums, tables.tensor_count, tables.device)
        report = bound.empty(tables.tensor_count, 1 + rule.sums, dtype=torch.float32)
        with device_guard(tables.device):
            normalizing, norms = self._gradient_norms(rule, bound, scalars)
            _run(
                *normalizing,
                self._prepare(its, bound, scalars, norms, None, sums, report),
                self._apply_chunks(its, bound, scalars),
            )
        return report

    def step(self, rule: Rule, bound: TritonBoundTensors, scalars: StepScalars) -> Tensor:
        if not rule.adapt:
            return self.apply(rule, bound, scalars, None)
        its, tables, slots = kernels(rule), bound.layout.tables, bound.workspace.slots
        report = bound.empty(tables.tensor_count, 1 + rule.sums, dtype=torch.float32)
        with device_guard(tables.device):
            normalizing, norms = self._gradient_norms(rule, bound, scalars)
            _run(
                *normalizing,
                *self._measure_chunks(its, bound, scalars, norms, slots),
                self._prepare(its, bound, scalars, norms, slots, None, report),
                self._apply_chunks(its, bound, scalars),
            )
        return report

    def _gradient_norms(
        self, rule: Rule | GradientNorm, bound: TritonBoundTensors, scalars: StepScalars
    ) -> tuple[list[Launch], GradientNorms]:
        """For a rule that normalizes gradients: where their sums of squares are, and the launches
        that store them there, unless the caller knows the sums."""
        tables = bound.layout.tables
        sums = checked_gradient_sums(rule, scalars, tables.tensor_count, tables.device)
        if sums is not None or not rule.normalize_grad:
            return [], GradientNorms(None, sums)
        slots = bound.workspace.gradient_slots
        norms = GradientNorms(slots, None)
        return self._measure_chunks(kernels(GradientNorm()), bound, scalars, norms, slots), norms

    def _measure_chunks(
        self,
        its: RuleKernels,
        bound: TritonBoundTensors,
        scalars: StepScalars,
        norms: GradientNorms,
        slots: Tensor,
    ) -> list[Launch]:
        """Launches that store the sums of each chunk in ``slots``. A rule whose measure writes
        counts the step in them, and advances its states."""
        given, stored = bound.workspace, (bound.tensors.dtypes, bool(bound.tensors.states), False)
        launches, types = [], types_of(*stored)
        if its.rule.measure_writes:
            launches.append(self._prepare(its, bound, scalars, norms, None, None, None))
            kind: tuple[Any, ...] = (stored, its.words)
            arguments: tuple[Any, ...] = (
                *(given.table, given.sizes, given.chunks, given.coefficients, slots),
                *(its.argument, types),
            )
        else:
            doubles = scalars.doubles
            kind = (stored, its.words, doubles is None)
            arguments = (
                *(given.table, given.numel, given.chunks, slots, doubles),
                *(scalars.lr, scalars.gradient_scale, its.argument, types),
            )
        count = bound.layout.tables.chunk_count
        launches.append(
            bound.layout.launcher(its.module.measure, count, kind, its.options, arguments)
        )
        return launches

    def _prepare(
        self,
        its: RuleKernels,
        bound: TritonBoundTensors,
        scalars: StepScalars,
        norms: GradientNorms,
        slots: Tensor | None,
        sums: Tensor | None,
        report: Tensor | None,
    ) -> Launch:
        """A launch that stores each tensor's coefficients and its row of the report, which the sums
        give: in ``slots`` those of the chunks, in ``sums`` those of the tensors."""
        given, doubles = bound.workspace, scalars.doubles
        absent = tuple(each is None for each in (doubles, *norms, slots, sums, report))
        arguments = (
            *(given.table, given.numel, given.first_chunk, *norms, slots, sums, report),
            *(given.sizes, given.coefficients, doubles, scalars.lr, scalars.gradient_scale),
            *(its.argument, LANES),
        )
        count, kind = bound.layout.tables.tensor_count, (its.words, absent)
        return bound.layout.launcher(its.module.prepare, count, kind, SMALL_OPTIONS, arguments)

    def _apply_chunks(
        self, its: RuleKernels, bound: TritonBoundTensors, scalars: StepScalars
    ) -> Launch:
        """A launch that writes weights, and the states that ``measure`` has not written."""
        given, tables, rounds = bound.workspace, bound.layout.tables, scalars.seed is not None
        stored = bound.tensors.dtypes, bool(bound.tensors.states), rounds
        streams = checked_streams(scalars, tables.tensor_count, tables.device)
        arguments = (
            *(given.table, given.sizes, given.chunks, given.coefficients, scalars.seed or 0),
            *(streams, its.argument, types_of(*stored)),
        )
        count, kind = tables.chunk_count, (stored, its.words, streams is None)
        return bound.layout.launcher(its.module.apply, count, kind, its.options, arguments)


def _run(*launches: Launch) -> None:
    for launch in launches:
        launch()
