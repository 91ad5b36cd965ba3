"""Averaging a bucket over all processes: rounded exactly as DDP does, or in half precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

COMPRESSIONS = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}
Future = torch.futures.Future


def first_value(future: Future[list[Tensor]]) -> Tensor:
    """The result of a finished reduction of one tensor; raises if the reduction failed."""
    return future.value()[0]


def compress(gradients: Tensor, size: int, into: Tensor) -> Tensor:
    """Divide by the number of processes, then round to the type of ``into``.

    Because the division comes first, the sum of any number of gradients that fit float16 also fits
    float16. Akiba, Suzuki, Fukuda 2017 (arXiv:1711.04325) also send gradients in half precision.

    Args:
        gradients: this process's gradients, of any shape.
        size: number of processes.
        into: a tensor of that shape; it is written, and returned.
    """
    return torch.mul(gradients, 1.0 / size, out=into)


class BucketAverager:
    """Scales buckets before they are summed, with the same bits as DDP without a hook.

    DDP multiplies a gradient by 1/size when it copies the gradient into its bucket, but divides by
    the size if the gradient is already in the bucket, or if it copies many gradients at once. The
    results differ unless the size is a power of two.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.group = ddp.process_group
        self.size: int = dist.get_world_size(self.group)
        exact = self.size & (self.size - 1) == 0
        self._divides = bool(getattr(ddp, "batched_grad_copy", False))
        # By parameter: the storage that its gradient had before DDP moved it into the bucket.
        self._grad_storages: dict[Tensor, int] = {}
        self._hooks: list[Any] = []
        if ddp.gradient_as_bucket_view and not exact and not self._divides:
            self._hooks = [
                p.register_post_accumulate_grad_hook(self._note_storage)
                for p in ddp.parameters()
                if p.requires_grad
            ]

    def _note_storage(self, p: Tensor) -> None:
        # This hook runs before DDP makes the gradient a view of the bucket.
        assert p.grad is not None
        self._grad_storages[p] = p.grad.untyped_storage()._cdata

    def scale(self, buffer: Tensor, bucket: GradBucket) -> Tensor:
        """Divide the bucket's ``buffer`` by the number of processes, in place."""
        if self._divides or buffer.layout != torch.strided:
            return buffer.div_(self.size)
        if not self._hooks:
            return buffer.mul_(1.0 / self.size)
        storage = buffer.untyped_storage()._cdata
        in_bucket = [self._grad_storages.pop(p, None) == storage for p in bucket.parameters()]
        if not any(in_bucket):
            return buffer.mul_(1.0 / self.size)
        for was_in_bucket, gradient in zip(in_bucket, bucket.gradients(), strict=True):
            if was_in_bucket:
                gradient.div_(self.size)
            else:
                gradient.mul_(1.0 / self.size)
        return buffer

    def start(self, tensor: Tensor) -> Future[list[Tensor]]:
        """Start to sum ``tensor`` over all processes, in place."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work.get_future()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
