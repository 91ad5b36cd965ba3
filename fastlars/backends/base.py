"""The interface between optimizers and back ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlars import _C
from fastlars.rules import GradientNorm, Rule

Mismatch = _C.Mismatch  # args: (list, index, what differs)


@dataclass(frozen=True)
class Dtypes:
    """The types of the tensors of one list: all its weights have the same type, and so on.

    ``copy`` is the type of the low-precision copies of the weights, None without copies.
    """

    weight: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    copy: torch.dtype | None = None


@dataclass
class Tensors:
    """The tensors of one call. All lists have the same length: the elements at one index belong to
    the same parameter.

    Attributes:
        weights: read and written by the rule; float32 master weights where there are copies.
        grads: gradients, with the shapes and strides of the weights; never written.
        states: one list for each name in ``rule.states``.
        counters: 0-dim float32 tensors, one for each weight; None if the rule has no counter.
        copies: low-precision parameters, written together with their master weights, or None.
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
    """Scalars of a step whose values are on the device and not known to the host.

    Each is None, or a tensor of one float32 or float64 element on the device.

    Attributes:
        lr: learning rate.
        grad_scale: the scale of a GradScaler, which divides ``StepScalars.gradient_scale``.
        found_inf: a GradScaler's flag: if it is not 0, the step changes nothing.
        square_norm: float64, the square of the global norm.
        limit: what the global norm is clipped to.
    """

    lr: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    square_norm: Tensor | None = None
    limit: float = math.inf

    @property
    def given(self) -> list[Tensor]:
        """The tensors that are not None."""
        every = (self.lr, self.grad_scale, self.found_inf, self.square_norm)
        return [tensor for tensor in every if tensor is not None]


@dataclass(frozen=True)
class StepScalars:
    """What changes from step to step.

    Attributes:
        lr: learning rate.
        gradient_scale: factor on every gradient: unscaling, global clip, sign of ``maximize``.
        seed: of stochastic rounding; None rounds to nearest.
        device: scalars whose values are on the device; they take precedence over those above. Only
            back ends with ``reads_device`` can read them, which they do without a wait of the host.
        gradient_sums: float64 [tensors, 1], the sum of squares of each scaled gradient, for a rule
            that divides gradients by their norms; None: the back end takes these sums itself.
        streams: int32 [tensors], the number by which each tensor draws random bits from the seed;
            None: its index in the list. With numbers of their own, tensors get the same bits in
            several calls as in one, whatever the order. The caller keeps what a graph reads.
    """

    lr: float
    gradient_scale: float = 1.0
    seed: int | None = None
    device: OnDevice | None = None
    gradient_sums: Tensor | None = None
    streams: Tensor | None = None

    def with_gradient_sums(self, sums: Tensor) -> StepScalars:
        """The same scalars with these ``gradient_sums``."""
        found = replace(self, gradient_sums=sums)
        if "doubles" in vars(self):  # they are the same, and not to be computed again
            vars(found)["doubles"] = self.doubles
        return found

    @cached_property
    def doubles(self) -> Tensor | None:
        """float64 [lr, gradient scale, skip], computed on the device; None without ``device``.

        For kernels that cannot read the tensors of ``device`` themselves. csrc/cuda can, and gets
        the same bits.
        """
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
        # Not torch.tensor(value): it copies from host memory, which a CUDA graph would read again
        # at each replay. torch.full passes the value as a launch argument.
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
    """Whether the elements fill their memory without gaps or overlaps, in any order."""
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
    """The sums for ``apply``, checked and contiguous; None if the rule does not adapt."""
    if not rule.adapt:
        return None
    return _checked("apply", "sums", sums, (tensors, rule.sums), torch.float64, device)


def checked_gradient_sums(
    rule: Rule | GradientNorm, scalars: StepScalars, tensors: int, device: torch.device
) -> Tensor | None:
    """The scalars' ``gradient_sums``, checked and contiguous; None if the rule needs none, or the
    back end takes them itself."""
    if not rule.normalize_grad or scalars.gradient_sums is None:
        return None
    what, given = f"a step of {rule.title}", scalars.gradient_sums
    return _checked(what, "sums", given, (tensors, 1), torch.float64, device)


def checked_streams(scalars: StepScalars, tensors: int, device: torch.device) -> Tensor | None:
    """The scalars' ``streams``, checked and contiguous; None if tensors draw random bits by their
    indices, or draw none."""
    if scalars.seed is None or scalars.streams is None:
        return None
    what, given = "stochastic rounding", scalars.streams
    return _checked(what, "streams", given, (tensors,), torch.int32, device)


def _checked(
    what: str,
    kind: str,
    given: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if given is None or given.shape != shape or given.dtype != dtype:
        expected = str(dtype).removeprefix("torch.")
        raise ValueError(f"{what} needs {expected} {kind} of shape {[*shape]}")
    if given.device != device:
        raise ValueError(f"{what} needs {kind} on {device}, got some on {given.device}")
    return given.contiguous()


def with_gradient_sums(
    backend: Backend, rule: Rule | GradientNorm, bound: Any, scalars: StepScalars
) -> StepScalars:
    """The scalars with the sums of squares of the gradients, if the rule needs them."""
    if not rule.normalize_grad or scalars.gradient_sums is not None:
        return scalars
    return scalars.with_gradient_sums(backend.measure(GradientNorm(), bound, scalars))


class Backend(Protocol):
    """Measures and applies a rule over a list of tensors.

    The caller keeps the result of ``layout`` for as long as it steps the same parameters. ``bind``
    returns what ``measure``, ``apply`` and ``step`` take.
    """

    name: str
    reads_device: bool
    """Whether ``StepScalars.device`` is read. Otherwise all scalars must be known to the host."""

    def layout(self, weights: list[Tensor]) -> Any:
        """The shapes, strides and devices that ``bind`` compares tensors with."""
        ...

    def bind(self, tensors: Tensors, layout: Any) -> Any:
        """Check the tensors, and prepare them for the calls below.

        Raises:
            Mismatch: a tensor does not fit the layout or its type; nothing was written.
        """
        ...

    def measure(self, rule: Rule | GradientNorm, bound: Any, scalars: StepScalars) -> Tensor:
        """Sums of squares, float64 [tensors, rule.sums]. Only for rules that adapt.

        The last column is of the update (LAMB), the gradient's direction (LANS) or the gradient
        (LARS, GradientNorm). A rule with ``measure_writes`` advances its states and counters here.
        ``measure`` and ``apply`` are separate so that sharded parameters can add up their sums in
        between.
        """
        ...

    def apply(self, rule: Rule, bound: Any, scalars: StepScalars, sums: Tensor | None) -> Tensor:
        """Write the weights; return a report of the step, float32 [tensors, 1 + rule.sums].

        A row of it has the tensor's trust ratio, and then the norms that the ratio is made of, in
        the order of ``rule.norms``: NaN if the rule does not adapt, for then nothing is measured.
        Where the device skips the step, the report means nothing.

        ``sums`` is None if the rule does not adapt; all states are then advanced here.
        """
        ...

    def step(self, rule: Rule, bound: Any, scalars: StepScalars) -> Tensor:
        """``measure``, then ``apply``; the back end may interleave the two."""
        ...
