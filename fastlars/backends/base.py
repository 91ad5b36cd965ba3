"""What an optimizer asks of a back end, and what it hands over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlars._C import Mismatch as Mismatch  # args: (list, index, what differs)
from fastlars.rules import GradientNorm, Rule


@dataclass(frozen=True)
class Kinds:
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
        copies: low-precision parameters, written beside their masters, or None.
        kinds: the types of all of these.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    states: tuple[list[Tensor], ...]
    counters: list[Tensor] | None
    copies: list[Tensor] | None
    kinds: Kinds


@dataclass(frozen=True)
class Scalars:
    """What changes from step to step.

    Attributes:
        lr: learning rate.
        gradient_scale: factor on every gradient: unscaling, global clip, sign of ``maximize``.
        seed: of stochastic rounding; None rounds to nearest.
        device: float64 [lr, gradient_scale, skip] for back ends with ``reads_device``, which take
            those from there instead, without a wait; where skip is not 0, nothing is changed.
    """

    lr: float
    gradient_scale: float = 1.0
    seed: int | None = None
    device: Tensor | None = None


class Backend(Protocol):
    """Measures and applies a rule over a list of tensors.

    ``bind`` checks that the tensors pair up and raises :class:`Mismatch` otherwise, before anything
    is written; the other calls take what it returned. ``layout`` is what :meth:`layout` made of the
    weights, kept by the caller for as long as it steps the same parameters.
    """

    name: str
    reads_device: bool
    """Whether ``Scalars.device`` is read; a step then needs no number that the device has."""

    def layout(self, weights: list[Tensor]) -> Any:
        """Shapes, strides and devices that every list is held against."""
        ...

    def bind(self, tensors: Tensors, layout: Any) -> Any:
        """Checked tensors, ready for the calls below."""
        ...

    def measure(self, rule: Rule | GradientNorm, bound: Any, now: Scalars) -> Tensor:
        """Sums of squares, float64 [tensors, 2]: of the weights, of what updates them. For rules
        that may adapt.

        LAMB advances its moments and step counters here. The two phases are separate so that
        sharded parameters can add up their sums in between.
        """
        ...

    def apply(self, rule: Rule, bound: Any, now: Scalars, sums: Tensor | None) -> Tensor:
        """Write the weights; return the trust ratios, float32 [tensors].

        ``sums`` is None where the rule does not adapt; LAMB then advances its moments here. RMSprop
        warm-up never adapts.
        """
        ...

    def step(self, rule: Rule, bound: Any, now: Scalars) -> Tensor:
        """``apply`` of what ``measure`` gives, in whatever order is fastest."""
        ...
