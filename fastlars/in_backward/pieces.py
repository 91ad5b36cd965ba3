"""Pieces of a step: parameters whose gradients are complete, ready to be stepped early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastlars.backends.base import Mismatch, StepScalars
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.execute import BoundBatch, StepResult, StepResults, mark_written
from fastlars.optim.planner import GroupSlice
from fastlars.rules import GradientNorm

# What is done with a piece before optimizer.step(): see Engine.
EarlyWork = Literal["step", "measure", "clip"]


def bound_or_none(slices: list[GroupSlice], optimizer: FusedOptimizer) -> list[BoundBatch] | None:
    """The batches of a piece; None where the whole step is left to ``optimizer.step()``, because
    something does not fit. ``step()`` then plans anew, or raises what is wrong."""
    planner, groups, states = optimizer.planner, optimizer.param_groups, optimizer.state
    try:
        return [b for part in slices for b in planner.bind_slice(part, groups, states)]
    except (Mismatch, KeyError, TypeError, ValueError, RuntimeError):
        return None


@dataclass
class InFlightPiece:
    """A piece whose early work is under way, or done: its batches, their scalars, the results.

    Attributes:
        batches: the parameters of the piece, bound to their gradients.
        scalars: of each batch.
        work: what is done early.
        future: done when the early work is; None where it is done at once.
        results: for each batch, what its back end returned; None where nothing was to be done.
    """

    batches: list[BoundBatch]
    scalars: list[StepScalars]
    work: EarlyWork
    future: torch.futures.Future[list[Tensor]] | None = None
    results: list[Tensor | None] = field(default_factory=list)

    def params(self) -> list[Tensor]:
        """The parameters of all batches."""
        return [p for b in self.batches for p in b.batch.weights]

    def work_early(self) -> None:
        """Do what can be done before ``optimizer.step()``, now that the gradients are there."""
        if self.work == "step":
            # Before the write: autograd then raises where backward still needs these weights.
            mark_written(self.batches)
        for b, scalars in zip(self.batches, self.scalars, strict=True):
            if self.work == "step":
                self.results.append(b.backend.step(b.rule, b.bound, scalars))
            elif self.work == "clip":
                self.results.append(b.backend.measure(GradientNorm(), b.bound, scalars))
            elif b.rule.adapt:
                self.results.append(b.backend.measure(b.rule, b.bound, scalars))
            else:
                self.results.append(None)

    def finish(self) -> StepResults:
        """Apply what was only measured; return what the step reports of each batch."""
        results = []
        for b, scalars, result in zip(self.batches, self.scalars, self.results, strict=True):
            if self.work != "step":
                result = b.backend.apply(b.rule, b.bound, scalars, result)
            assert result is not None
            results.append(StepResult(b.batch.weights, b.rule, result))
        if self.work != "step":
            mark_written(self.batches)
        return results


@dataclass
class PremeasuredBatch(BoundBatch):
    """A batch of which sums of squares are known already: those of its gradients, or its rule's."""

    of_gradients: Tensor | None = None
    of_rule: Tensor | None = None

    def gradient_sums(self, scalars: StepScalars) -> Tensor:
        known = self.of_gradients
        return super().gradient_sums(scalars) if known is None else known

    def measure(self, scalars: StepScalars) -> Tensor:
        return super().measure(scalars) if self.of_rule is None else self.of_rule


class KnownSums:
    """The sums of squares that pieces have measured, by parameter."""

    def __init__(self, pieces: list[InFlightPiece]) -> None:
        self._rows: dict[Tensor, tuple[Tensor, int]] = {}
        for piece in pieces:
            for b, sums in zip(piece.batches, piece.results, strict=True):
                if sums is not None:
                    self._rows.update((p, (sums, i)) for i, p in enumerate(b.batch.weights))

    def __contains__(self, p: Tensor) -> bool:
        return p in self._rows

    def of(self, params: list[Tensor]) -> Tensor | None:
        """The rows of these parameters, in their order; None where one of them is not known."""
        if not all(p in self._rows for p in params):
            return None
        starts: dict[int, int] = {}
        tensors: list[Tensor] = []
        end = 0
        for p in params:
            sums = self._rows[p][0]
            if id(sums) not in starts:
                starts[id(sums)] = end
                tensors.append(sums)
                end += len(sums)
        places = [starts[id(self._rows[p][0])] + self._rows[p][1] for p in params]
        order = torch.tensor(places, device="cpu")
        every = torch.cat(tensors)
        return every[order.to(every.device, non_blocking=True)]


def with_known_sums(batches: list[BoundBatch], pieces: list[InFlightPiece]) -> list[BoundBatch]:
    """The batches, with the sums that the pieces have measured for all parameters of a batch."""
    of_gradients = KnownSums([piece for piece in pieces if piece.work == "clip"])
    of_rule = KnownSums([piece for piece in pieces if piece.work == "measure"])
    return [
        PremeasuredBatch(
            *(b.group, b.rule, b.batch, b.bound),
            of_gradients=of_gradients.of(b.batch.weights),
            of_rule=of_rule.of(b.batch.weights),
        )
        for b in batches
    ]
