"""The rules in plain torch: the specification against which every other back end is tested.

A rule's equations are in the module of its name: ``rule.name``. Symbols are those of
docs/numerics.md, "Notation". For one parameter, where w and g are the weight and the scaled
gradient in the type of the arithmetic, and states and counter are stored tensors, the module has

* ``normalized(rule, g, norm)``: the gradient that takes g's place, if ``rule.normalize_grad``;
* ``measured(rule, w, g, states, counter)``: the ``rule.sums`` tensors whose norms are taken;
* ``trust_ratio(rule, lr, *norms)``: the ratio q, or a tuple of two, of which the first is reported;
* ``advance(rule, w, g, states)``: writes the states of a rule with ``measure_writes``;
* ``update(rule, lr, q, w, g, states, counter)``: returns the new weight; writes all other states.

This module advances the counters. When these functions are called, a counter of steps has counted
this step already; a counter that holds a learning rate still holds that of the step before.

This back end serves float64 and strided tensors, and any device that no other back end serves.
Arithmetic is float64 for float64 and float32 for all other types; sums of squares are float64, on
a device that has it, and float32 on one that has not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import (
    Mismatch,
    StepScalars,
    Tensors,
    checked_streams,
    with_gradient_sums,
)
from fastlars.backends.float64 import has_float64
from fastlars.rules import GradientNorm, Rule


@cache
def equations(name: str) -> ModuleType:
    """The module with the equations of a rule, named after it."""
    return import_module(f"{__name__}.{name}")


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_of_squares(x: Tensor) -> float:
    x = x.contiguous()  # another layout would be added up in another order
    if not has_float64(x.device):
        total = float(x.square().sum())
        # Squares of values beyond about 1e19 or 1e-19 exceed the limits of float32.
        if 1e-25 < total < 1e37:
            return total
        x = x.cpu()
    return float(x.to(torch.float64).square().sum())


def _round_stochastically(value: Tensor, seed: int, stream: int) -> Tensor:
    """float32 to bfloat16, rounded up with a probability proportional to the truncated bits."""
    generator = torch.Generator("cpu").manual_seed((seed + 0x9E3779B9 * stream) % 2**63)
    shape = value.shape
    random = torch.randint(2**16, shape, generator=generator, dtype=torch.int32, device="cpu")
    bits = value.view(torch.int32)
    rounded = ((bits + random.to(value.device)) & -(2**16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


class Reference:
    """Steps one tensor at a time, with torch operations."""

    name = "reference"
    reads_device = False

    def layout(self, weights: list[Tensor]) -> list[tuple[torch.Size, torch.device]]:
        return [(w.shape, w.device) for w in weights]

    def bind(self, tensors: Tensors, layout: list[tuple[torch.Size, torch.device]]) -> Tensors:
        dtypes = tensors.dtypes
        lists: list[tuple[str, list[Tensor], Any]] = [
            ("weights", tensors.weights, dtypes.weight),
            ("grads", tensors.grads, dtypes.grad),
            *(("states", state, dtypes.state) for state in tensors.states),
        ]
        if tensors.copies is not None:
            lists.append(("copies", tensors.copies, dtypes.copy))
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
        self, rule: Rule | GradientNorm, tensors: Tensors, scalars: StepScalars
    ) -> Iterator[tuple[Tensor, Tensor, list[Tensor], Tensor | None]]:
        """w, g, states and counter of each parameter."""
        dtype = _arithmetic(tensors.dtypes.weight)
        norms: list[float] = []
        if rule.normalize_grad:
            sums = with_gradient_sums(self, rule, tensors, scalars).gradient_sums
            norms = [] if sums is None else sums[:, 0].sqrt().tolist()
        for i, (w, g) in enumerate(zip(tensors.weights, tensors.grads, strict=True)):
            states = [each[i] for each in tensors.states]
            counter = None if tensors.counters is None else tensors.counters[i]
            g = scalars.gradient_scale * g.to(dtype)
            if norms:
                g = equations(rule.name).normalized(rule, g, norms[i])
            yield w.to(dtype), g, states, counter

    def _advance(
        self,
        rule: Rule | GradientNorm,
        w: Tensor,
        g: Tensor,
        states: list[Tensor],
        counter: Tensor | None,
    ) -> None:
        if counter is not None and rule.counts_steps:
            counter += 1.0
        if rule.measure_writes:
            equations(rule.name).advance(rule, w, g, states)

    def measure(self, rule: Rule | GradientNorm, bound: Tensors, scalars: StepScalars) -> Tensor:
        sums = []
        for each in self._each(rule, bound, scalars):
            if rule.measure_writes:
                self._advance(rule, *each)
            measured = equations(rule.name).measured(rule, *each)
            sums.append([_sum_of_squares(x) for x in measured])
        return torch.tensor(sums, dtype=torch.float64, device="cpu").reshape(len(sums), rule.sums)

    def apply(
        self, rule: Rule, bound: Tensors, scalars: StepScalars, sums: Tensor | None
    ) -> Tensor:
        lr, rows, count = scalars.lr, [], len(bound.weights)
        given = checked_streams(scalars, count, bound.weights[0].device) if count else None
        streams = range(count) if given is None else given.tolist()
        for i, (w, g, states, counter) in enumerate(self._each(rule, bound, scalars)):
            q: Any = 1.0
            norms = [math.nan] * rule.sums
            if sums is not None and rule.adapt:
                norms = [math.sqrt(each) for each in sums[i].tolist()]
                q = equations(rule.name).trust_ratio(rule, lr, *norms)
            if sums is None or not rule.measure_writes:
                self._advance(rule, w, g, states, counter)
            new = equations(rule.name).update(rule, lr, q, w, g, states, counter)
            if counter is not None and not rule.counts_steps:
                counter.fill_(lr)
            self._store(bound, i, new, scalars.seed, streams[i])
            rows.append([q[0] if isinstance(q, tuple) else q, *norms])
        report = torch.tensor(rows, dtype=torch.float32, device="cpu")
        return report.reshape(len(rows), 1 + rule.sums)

    def _store(self, bound: Tensors, i: int, new: Tensor, seed: int | None, stream: int) -> None:
        weight = bound.weights[i]
        if seed is not None and weight.dtype == torch.bfloat16:
            new = _round_stochastically(new, seed, stream)
        weight.copy_(new)
        if bound.copies is not None:
            bound.copies[i].copy_(new)

    def step(self, rule: Rule, bound: Tensors, scalars: StepScalars) -> Tensor:
        sums = self.measure(rule, bound, scalars) if rule.adapt else None
        return self.apply(rule, bound, scalars, sums)
