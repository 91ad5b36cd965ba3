"""A bucket of DDP as the optimizer sees it: slices of its groups, ready to be stepped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from fastlars.backends.base import Mismatch, StepScalars, is_dense
from fastlars.distributed.averaging import Future
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.execute import BoundBatch, StepResult, StepResults, mark_written
from fastlars.optim.planner import GroupSlice, slices_of
from fastlars.optim.scalars import Scalars, scalars_for
from fastlars.optim.values import same_objects
from fastlars.rules import GradientNorm

# What is done with a bucket before optimizer.step(): see Engine.
EarlyWork = Literal["step", "measure", "clip"]


def gradient_views(params: list[Tensor], bucket: GradBucket, flat: Tensor) -> list[Tensor]:
    """The gradients in ``flat``, which is laid out as the bucket's buffer."""
    start = bucket.buffer().storage_offset()
    found = []
    for p, gradient in zip(params, bucket.gradients(), strict=True):
        offset = gradient.storage_offset() - start + flat.storage_offset()
        # bucket.gradients() takes every gradient for contiguous; DDP lays it out as its parameter.
        strides = p.stride() if is_dense(p) else gradient.stride()
        found.append(flat.as_strided(p.shape, strides, offset))
    return found


@dataclass
class Bucket:
    """What is kept of a bucket from step to step, until DDP builds its buckets anew."""

    params: list[Tensor]
    storage: int  # identifies the memory of DDP's buffer
    reduced: Tensor  # what is summed over the processes: DDP's buffer, or a half-precision one
    slices: list[GroupSlice]

    @classmethod
    def of(
        cls,
        bucket: GradBucket,
        optimizer: FusedOptimizer,
        dtype: torch.dtype | None,
        left_out: set[Tensor],
    ) -> Bucket:
        """Args:
        bucket: DDP's.
        optimizer: steps some or all of its parameters.
        dtype: of the compression; buckets of float16 and bfloat16 are not compressed any further.
        left_out: parameters that the bucket must not step.
        """
        buffer = bucket.buffer()
        params = bucket.parameters()
        reduced = buffer
        if dtype is not None and buffer.dtype.itemsize > 2:
            reduced = torch.empty_like(buffer, dtype=dtype)
        grads = zip(params, gradient_views(params, bucket, reduced), strict=True)
        grads_of = {p: g for p, g in grads if p not in left_out}
        storage = buffer.untyped_storage()._cdata
        return cls(params, storage, reduced, slices_of(optimizer.param_groups, grads_of))

    def fits(self, bucket: GradBucket) -> bool:
        """Whether ``bucket`` still has the same memory for the same parameters."""
        params = bucket.parameters()
        return bucket.buffer().untyped_storage()._cdata == self.storage and same_objects(
            params, self.params
        )

    def steps_all(self) -> bool:
        """Whether the bucket steps all its parameters, so that nothing else reads its gradients."""
        return sum(len(part.indices) for part in self.slices) == len(self.params)

    def bind_slices(self, optimizer: FusedOptimizer) -> list[BoundBatch] | None:
        """The bucket's batches; None where the whole step is left to ``optimizer.step()``, because
        something does not fit. ``step()`` then plans anew, or raises what is wrong."""
        planner, groups, states = optimizer.planner, optimizer.param_groups, optimizer.state
        try:
            return [b for part in self.slices for b in planner.bind_slice(part, groups, states)]
        except (Mismatch, KeyError, TypeError, ValueError, RuntimeError):
            return None


@dataclass
class InFlightBucket:
    """A bucket that is being reduced: its batches, their scalars, and what was computed early."""

    batches: list[BoundBatch]
    scalars: list[StepScalars]
    future: Future[list[Tensor]] | None = None
    results: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def of(cls, batches: list[BoundBatch], for_norm: bool) -> InFlightBucket:
        """``for_norm``: only the norm of the gradients is wanted, and no learning rate is read."""
        scalars = scalars_for(b.backend for b in batches)
        if for_norm:
            return cls(batches, [scalars.unclipped(b.sign, b.device) for b in batches])
        return cls(batches, [b.step_scalars(scalars) for b in batches])

    def params(self) -> list[Tensor]:
        """The parameters of all batches."""
        return [p for b in self.batches for p in b.batch.weights]

    def work_early(self, work: EarlyWork | None) -> None:
        """Do with the reduced bucket what can be done before ``optimizer.step()``."""
        if work == "step":
            # Before the write: autograd then raises where backward still needs these weights.
            mark_written(self.batches)
        for b, scalars in zip(self.batches, self.scalars, strict=True):
            if work == "step":
                self.results.append(b.backend.step(b.rule, b.bound, scalars))
            elif work == "clip":
                self.results.append(b.backend.measure(GradientNorm(), b.bound, scalars))
            elif b.rule.adapt:
                self.results.append(b.backend.measure(b.rule, b.bound, scalars))
            else:
                self.results.append(None)

    def finish(self, work: EarlyWork | None) -> StepResults:
        """Apply what was only measured; return what the step reports of each batch."""
        results = []
        for b, scalars, result in zip(self.batches, self.scalars, self.results, strict=True):
            if work != "step":
                result = b.backend.apply(b.rule, b.bound, scalars, result)
            assert result is not None
            results.append(StepResult(b.batch.weights, b.rule, result))
        if work != "step":
            mark_written(self.batches)
        return results


@dataclass
class PremeasuredBatch(BoundBatch):
    """A batch whose gradients' sums of squares are known already."""

    sums: Tensor

    def square_norms(self, scalars: Scalars) -> Tensor:
        return self.sums


def with_known_sums(batches: list[BoundBatch], buckets: list[InFlightBucket]) -> list[BoundBatch]:
    """The batches, with the sums that the buckets have measured for all parameters of a batch."""
    rows: dict[Tensor, tuple[Tensor, int]] = {}
    for bucket in buckets:
        for b, sums in zip(bucket.batches, bucket.results, strict=True):
            assert sums is not None
            rows.update((p, (sums, i)) for i, p in enumerate(b.batch.weights))
    return [_with_known_sums(b, rows) for b in batches]


def _with_known_sums(b: BoundBatch, rows: dict[Tensor, tuple[Tensor, int]]) -> BoundBatch:
    params = b.batch.weights
    if not all(p in rows for p in params):
        return b
    starts: dict[int, int] = {}
    tensors: list[Tensor] = []
    end = 0
    for p in params:
        sums = rows[p][0]
        if id(sums) not in starts:
            starts[id(sums)] = end
            tensors.append(sums)
            end += len(sums)
    places = [starts[id(rows[p][0])] + rows[p][1] for p in params]
    order = torch.tensor(places, device="cpu")
    every = torch.cat(tensors)
    sums = every[order.to(every.device, non_blocking=True)]
    return PremeasuredBatch(b.group, b.rule, b.batch, b.bound, sums)
