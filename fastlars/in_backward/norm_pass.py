"""NormPass: the norm of all gradients, from a backward pass that frees them as they arrive."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fastlars.in_backward.pieces import InFlightPiece, KnownSums
from fastlars.in_backward.waiting import Waiting
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.execute import BoundBatch
from fastlars.optim.planner import slices_of
from fastlars.optim.scalars import Scalars, scalars_for, square_of_norm


class NormPass:
    """Measures gradients bucket by bucket; then gives the scalars of a step of this norm."""

    def __init__(
        self, optimizer: FusedOptimizer, bucket_bytes: float, left_out: set[Tensor]
    ) -> None:
        """Args:
        optimizer: steps the parameters later.
        bucket_bytes: of gradients that are measured together.
        left_out: parameters whose gradients may arrive in several parts.
        """
        self._optimizer = optimizer
        self._bucket_bytes = bucket_bytes
        self._left_out = left_out
        self._waiting = Waiting()
        self._at_the_end = Waiting()
        self._measured: set[Tensor] = set()
        self._pieces: list[InFlightPiece] = []
        optimizer.planner.keep_up_with(optimizer.param_groups, optimizer.state)

    def take(self, p: Tensor) -> None:
        """A parameter's gradient has arrived."""
        if p in self._measured:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} has arrived in several "
                "parts in norm_pass(): pass the parameter to step_in_backward as except_for"
            )
        if p in self._left_out:
            self._at_the_end.add(p)
            return
        self._waiting.add(p)
        if self._waiting.nbytes >= self._bucket_bytes:
            self._measure(self._waiting)

    def end(self) -> None:
        """At the end of the backward pass: measure the gradients that wait."""
        self._measure(self._waiting)
        self._measure(self._at_the_end)

    def _measure(self, waiting: Waiting) -> None:
        """Measure these gradients, and free them."""
        params = waiting.take()
        self._measured.update(params)
        optimizer = self._optimizer
        if not optimizer.stepper.needs_norm(optimizer.param_groups):
            for p in params:
                p.grad = None
            return
        grads: dict[Tensor, Any] = {p: p.grad for p in params}
        groups = optimizer.param_groups
        with torch.no_grad():
            batches = optimizer.planner.bind_slices(
                slices_of(groups, grads), groups, optimizer.state
            )
            scalars = scalars_for(b.backend for b in batches)
            each = [scalars.unclipped(b.sign, b.device) for b in batches]
            piece = InFlightPiece(batches, each, "clip")
            piece.work_early()
        self._pieces.append(piece)
        for b in batches:
            b.bound = None
        for p in params:
            p.grad = None

    def decide(self) -> Scalars:
        """The scalars of the step, clipped by the norm; they also say whether to skip it."""
        every = [b for piece in self._pieces for b in piece.batches]
        scalars = scalars_for(b.backend for b in every)
        with torch.no_grad():
            square = square_of_norm(self._sums(every), scalars.on_device)
            self._optimizer.stepper.decide(square, scalars)
        return scalars

    def _sums(self, batches: list[BoundBatch]) -> list[Tensor]:
        """The sums of squares in the order in which an ordinary step adds them up on a device."""
        known = KnownSums(self._pieces)
        members: dict[Any, set[Tensor]] = defaultdict(set)
        for b in batches:
            key = (id(b.group), b.device, b.batch.dtypes, b.batch.backend, b.batch.path)
            members[key].update(b.batch.weights)
        found = []
        for group in self._optimizer.param_groups:
            for params in [m for key, m in members.items() if key[0] == id(group)]:
                found.append(known.of([p for p in group["params"] if p in params]))
        return [sums for sums in found if sums is not None]

    def check_measured(self, params: list[Tensor]) -> None:
        """Raise unless the norm includes the gradients of these parameters."""
        if not self._measured.issuperset(params):
            raise RuntimeError(
                "a parameter has a gradient that norm_pass() has not measured: both passes must go "
                "through the same graph. Some parameters may have been stepped: go on from a "
                "checkpoint"
            )
