"""The average of a bucket over all processes, rounded as DDP rounds it, or in half precision."""

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
    """What a reduction of one tensor gave; raises where it failed."""
    return future.value()[0]


def compress(gradients: Tensor, size: int, into: Tensor) -> Tensor:
    """Divide by the number of processes, then round to the type of ``into``.

    In this order, gradients that fit a float16 still fit it when they are added up over any number
    of processes. Akiba, Suzuki, Fukuda 2017 (`arXiv:1711.04325 <https://arxiv.org/abs/1711.04325>`_)
    send half precision too.

    Args:
        gradients: this process's own, of any shape.
        size: number of processes.
        into: as long as ``gradients``; it is written, and returned.
    """
    return torch.mul(gradients, 1.0 / size, out=into)


class BucketAverager:
    """Scales buckets before their sum, to the bit as DDP does where it has no hook.

    DDP multiplies by 1/size while it copies a gradient into its bucket, but divides by the size
    where the gradient already lies there, or where it copies many at once. For sizes that are no
    powers of two these differ.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.group = ddp.process_group
        self.size: int = dist.get_world_size(self.group)
        exact = self.size & (self.size - 1) == 0
        self._divides = bool(getattr(ddp, "batched_grad_copy", False))
        self._kept: dict[Tensor, int] = {}
        self._hooks: list[Any] = []
        if ddp.gradient_as_bucket_view and not exact and not self._divides:
            self._hooks = [
                p.register_post_accumulate_grad_hook(self._note)
                for p in ddp.parameters()
                if p.requires_grad
            ]

    def _note(self, p: Tensor) -> None:
        # Before DDP makes the gradient a view of the bucket, if it was none already.
        assert p.grad is not None
        self._kept[p] = p.grad.untyped_storage()._cdata

    def scale(self, buffer: Tensor, bucket: GradBucket) -> Tensor:
        """``buffer``, which is the bucket's, over the number of processes, in place."""
        if self._divides or buffer.layout != torch.strided:
            return buffer.div_(self.size)
        if not self._hooks:
            return buffer.mul_(1.0 / self.size)
        own = buffer.untyped_storage()._cdata
        kept = [self._kept.pop(p, None) == own for p in bucket.parameters()]
        if not any(kept):
            return buffer.mul_(1.0 / self.size)
        for inside, gradient in zip(kept, bucket.gradients(), strict=True):
            if inside:
                gradient.div_(self.size)
            else:
                gradient.mul_(1.0 / self.size)
        return buffer

    def start(self, tensor: Tensor) -> Future[list[Tensor]]:
        """Begin to add up ``tensor`` over all processes, in place."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work.get_future()

    def close(self) -> None:
        """Leave the parameters alone."""
        for hook in self._hooks:
            hook.remove()
