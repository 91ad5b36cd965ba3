"""One optimizer step, and what it computes in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fastlars.trainer import batchnorm
from fastlars.trainer.data import Batch
from fastlars.trainer.distributed import parallel
from fastlars.trainer.meter import Meter
from fastlars.trainer.parts import Parts
from fastlars.trainer.precision import Precision


class Step:
    """Steps over --batch-size images, some of them in each process.

    Attributes:
        lr: learning rate of the last step.
    """

    def __init__(self, parts: Parts, precision: Precision) -> None:
        self.lr = 0.0
        self._parts, self._precision = parts, precision
        self._wrapped = parallel(parts.model, parts.world)

    def take(self, batches: Iterator[Batch], meter: Meter) -> None:
        """Train on the next of `batches`, and count them in `meter`."""
        parts = self._parts
        self._wrapped.train()
        parts.optimizer.zero_grad(set_to_none=True)
        batchnorm.forget(parts.model)
        for number in range(parts.plan.micro_batches):
            last = number == parts.plan.micro_batches - 1
            # Gradients travel once a step, with the last micro-batch.
            quiet = isinstance(self._wrapped, DistributedDataParallel) and not last
            with self._wrapped.no_sync() if quiet else nullcontext():  # type: ignore[operator]
                self._backward(next(batches), meter)
        self.lr = float(parts.schedule.get_last_lr()[0])
        if self._precision.step(parts.optimizer):
            parts.schedule.step()

    def _backward(self, batch: Batch, meter: Meter) -> None:
        config, world = self._parts.config, self._parts.world
        images, labels = batch
        with self._precision.autocast():
            logits = self._wrapped(images)
        loss = functional.cross_entropy(
            logits.float(), labels, label_smoothing=config.label_smoothing, reduction="sum"
        )
        # Goyal et al. 2017, remark 3: the gradient is divided by the global batch. DDP divides by
        # the number of processes already.
        share = loss * (world.size / config.batch_size)
        self._precision.scaled(share).backward()
        meter.add(loss, logits, labels)
