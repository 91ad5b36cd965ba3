"""What an optimizer asks of a back end, and what it hands over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlars._C import Mismatch as Mismatch  # args: (list, index, what differs)
from fastlars.rules import GradientNorm, Rule


@dataclass(frozen=True)
class Dtypes:
    """The types of a list's tensors, one each for all tensors of the list."""

    weight: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    copy: torch.dtype | None = None


@dataclass
class Tensors:
    """What one call steps. All lists have the same length, and pair up element by element.

    Attributes:
        weights: what the rule reads and writes; float32 masters where there are copies.
        grads: gradients, shaped and strided like the weights; never written.
        states: one list for each name in ``rule.states``.
        counters: one 0-dim float32 tensor each for ``rule.counter``, or None.
        copies: low-precision parameters, written together with their masters, or None.
        dtypes: the types of all of these.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    states: tuple[list[Tensor], ...]
    counters: list[Tensor] | None
    copies: list[Tensor] | None
    dtypes: Dtypes


@dataclass(frozen=True)
class OnDevice:
    """Numbers of a step that its device knows and the host does not: tensors of one element there,
    float32 or float64, or None.

    Attributes:
        lr: learning rate.
        grad_scale: of a GradScaler: divides ``StepScalars.gradient_scale``, which is 1 or -1.
        found_inf: its verdict: where it is not 0, nothing is changed.
        square_norm: float64, the square of the global norm, which is clipped to ``limit``.
    """

    lr: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    square_norm: Tensor | None = None
    limit: float = math.inf

    @property
    def given(self) -> list[Tensor]:
        """The tensors."""
        every = (self.lr, self.grad_scale, self.found_inf, self.square_norm)
        return [tensor for tensor in every if tensor is not None]


@dataclass(frozen=True)
class StepScalars:
    """What changes from step to step.

    Attributes:
        lr: learning rate.
        gradient_scale: factor on every gradient: unscaling, global clip, sign of ``maximize``.
        seed: of stochastic rounding; None rounds to nearest.
        device: for back ends with ``reads_device``, which take from there what is there, without a
            wait.
    """

    lr: float
    gradient_scale: float = 1.0
    seed: int | None = None
    device: OnDevice | None = None

    @cached_property
    def doubles(self) -> Tensor | None:
        """float64 [lr, gradient scale, skip] where the device knows any of them, made there: for
        kernels that cannot take them from where they lie, as csrc/cuda does, to the same bits."""
        there = self.device
        if there is None:
            return None
        scale: Tensor | float = self.gradient_scale
        if there.grad_scale is not None:
            scale = scale / _double(there.grad_scale)
        if there.square_norm is not None:
            norm = _double(there.square_norm).sqrt()
            scale = scale * torch.where(norm > there.limit, there.limit / norm, 1.0)
        values = (
            self.lr if there.lr is None else there.lr,
            scale,
            0.0 if there.found_inf is None else there.found_inf,
        )
        # full fills in a launch: no host memory that a graph would read again at its replay.
        return torch.stack(
            [
                _double(value)
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=torch.float64, device=there.given[0].device)
                for value in values
            ]
        )


def _double(value: Tensor) -> Tensor:
    return value.detach().reshape(()).to(torch.float64)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return True
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def checked_sums(
    rule: Rule, sums: Tensor | None, tensors: int, device: torch.device
) -> Tensor | None:
    """The sums that ``apply`` reads, contiguous; None where the rule does not adapt."""
    if not rule.adapt:
        return None
    shape = tensors, rule.sums
    if sums is None or sums.shape != shape or sums.dtype != torch.float64:
        raise ValueError(f"apply needs float64 sums of shape {[*shape]}")
    if sums.device != device:
        raise ValueError(f"apply needs sums on {device}, got some on {sums.device}")
    return sums.contiguous()


class Backend(Protocol):
    """Measures and applies a rule over a list of tensors.

    ``bind`` checks that the tensors pair up and raises :class:`Mismatch` otherwise, before anything
    is written; the other calls take what it returned. ``layout`` is what :meth:`layout` made of the
    weights, kept by the caller for as long as it steps the same parameters.
    """

    name: str
    reads_device: bool
    """Whether ``StepScalars.device`` is read; a step then needs no number that the device has."""

    def layout(self, weights: list[Tensor]) -> Any:
        """Shapes, strides and devices that every list is held against."""
        ...

    def bind(self, tensors: Tensors, layout: Any) -> Any:
        """Checked tensors, ready for the calls below."""
        ...

    def measure(self, rule: Rule | GradientNorm, bound: Any, scalars: StepScalars) -> Tensor:
        """Sums of squares, float64 [tensors, rule.sums]; the last one is of what updates the
        weights. For rules that may adapt.

        A rule with ``measure_writes`` advances its states and counters here. The two phases are
        separate so that sharded parameters can add up their sums in between.
        """
        ...

    def apply(self, rule: Rule, bound: Any, scalars: StepScalars, sums: Tensor | None) -> Tensor:
        """Write the weights; return the trust ratios, float32 [tensors].

        ``sums`` is None where the rule does not adapt; all states are then advanced here.
        """
        ...

    def step(self, rule: Rule, bound: Any, scalars: StepScalars) -> Tensor:
        """``apply`` of what ``measure`` gives, in whatever order is fastest."""
        ...
