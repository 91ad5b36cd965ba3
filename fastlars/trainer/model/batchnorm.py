"""Batch norm as the papers define it: over n images, and with the last step's statistics.

Goyal et al. 2017 (section 3.1) make n, the images that are normalised together, part of the loss:
workers are added, n stays. Akiba et al. 2017 evaluate with the statistics of the last step,
averaged over the workers, in place of running averages.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


def replace_norms(model: nn.Module, bn_batch: int, bn_statistics: str) -> None:
    """Give every nn.BatchNorm2d of the model ghost batches and the statistics asked for, in place.

    Parameters, buffers and their names stay as they are. In training there are `bn_batch` images in
    a ghost batch, 0 for the whole forward pass; one that it does not divide is cut into parts as
    near to it as possible. `bn_statistics`: "running" averages or those of the "last" step.
    """
    if not bn_batch and bn_statistics == "running":
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                ghost = GhostBatchNorm2d(child, bn_batch, last=bn_statistics == "last")
                parent.register_module(name, ghost)


def reset_step_statistics(model: nn.Module) -> None:
    """Reset the statistics of the "last" step, before a step."""
    norms = _last(model)
    if norms:
        torch._foreach_zero_([buffer for norm in norms for buffer in norm.buffers()])


def share(model: nn.Module, processes: int, bn_statistics: str) -> None:
    """Give all processes the same statistics, before an evaluation or a checkpoint.

    "running": the averages of the first process. "last": the means over all processes of the last
    step's means and variances.
    """
    if processes == 1:
        return
    if bn_statistics == "running":
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
        return
    norms = _last(model)
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    flat = torch.cat(buffers)
    dist.all_reduce(flat)
    flat /= processes
    torch._foreach_copy_(buffers, list(flat.split([b.numel() for b in buffers])))


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises each ghost batch as a separate forward pass would.

    With `last`, running_mean and running_var are the plain means of the statistics of all ghost
    batches since `num_batches_tracked` was 0.
    """

    def __init__(self, norm: nn.BatchNorm2d, bn_batch: int, *, last: bool) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.train(norm.training)
        self.bn_batch, self.last = bn_batch, last

    def forward(self, input: Tensor) -> Tensor:
        """Normalised images, [N, C, H, W], in the format of the input."""
        parts = 1
        if self.training and self.bn_batch:  # halves go down: no part of a single image
            parts = max(math.ceil(len(input) / self.bn_batch - 0.5), 1)
        if parts == 1:
            return self._of_one(input)
        return torch.cat([self._of_one(part) for part in input.tensor_split(parts)])

    def _of_one(self, images: Tensor) -> Tensor:
        if not (self.training and self.last):
            return super().forward(images)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        found = functional.batch_norm(
            images, mean, var, self.weight, self.bias, True, 1.0, self.eps
        )
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = 1.0 / self.num_batches_tracked  # on the device: .item() would wait for it
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var, share)
        return found


def _last(model: nn.Module) -> list[GhostBatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, GhostBatchNorm2d) and m.last]
