"""A bucket of DDP as the optimizer sees it: slices of its groups, whose gradients lie in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from fastlars.backends.base import is_dense
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.planner import GroupSlice, slices_of
from fastlars.optim.values import same_objects


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
