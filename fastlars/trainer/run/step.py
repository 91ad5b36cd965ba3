"""One optimizer step: forward and backward passes, gradients between processes, the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fastlars.distributed import overlap
from fastlars.trainer.data.dataset import Batch
from fastlars.trainer.errors import TrainerError, one_line
from fastlars.trainer.model import batchnorm, norms
from fastlars.trainer.model.average import averaged
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.model.precision import Precision
from fastlars.trainer.process.world import parallel
from fastlars.trainer.run.meter import Meter


class Step:
    """Steps over --batch-size images, some of them in each process.

    Attributes:
        lr: learning rate of the last step.
        average: moving average of the model, where --ema asks for one.
    """

    def __init__(self, context: TrainingContext, precision: Precision) -> None:
        self.lr = 0.0
        self.average = averaged(context.model, context.config.ema)
        self._context, self._precision = context, precision
        self._wrapped = parallel(context.model, context.world)
        self._compiler_errors: tuple[type[Exception], ...] = ()
        if context.config.overlap and isinstance(self._wrapped, DistributedDataParallel):
            _overlap(self._wrapped, context)
        if context.config.compile:
            # DDP and not the model in it: graphs are cut where a bucket of gradients is full, which
            # travels while the rest is computed. In place, or names in checkpoints would change.
            self._wrapped.compile()
            self._compiler_errors = (torch._dynamo.exc.TorchDynamoException,)

    @property
    def model(self) -> nn.Module:
        """What is to be evaluated."""
        return self._context.model if self.average is None else self.average.module

    def take(self, batches: Iterator[Batch], meter: Meter) -> dict[str, tuple[float, float]] | None:
        """Train on the next of `batches`, and count them in `meter`.

        Returns:
            Norms of weights and gradients before the step, where a record of them is due.
        """
        context, scale = self._context, self._precision.gradient_scale
        self._wrapped.train()
        context.optimizer.zero_grad(set_to_none=True)
        batchnorm.forget(context.model)
        recorded = context.log is not None and context.schedule.last_epoch in norms.STEPS
        weights = norms.weights(context.model) if recorded else {}
        for number in range(context.order.micro_batches):
            last = number == context.order.micro_batches - 1
            # Gradients travel once a step, with the last micro-batch.
            quiet = isinstance(self._wrapped, DistributedDataParallel) and not last
            with self._wrapped.no_sync() if quiet else nullcontext():  # type: ignore[operator]
                try:
                    self._backward(next(batches), meter)
                except self._compiler_errors as error:
                    # The paragraphs after the first say how to debug torch.
                    reason = " ".join(str(error).split("\n\n")[0].split())
                    raise TrainerError(f"--compile: torch.compile failed: {reason}") from error
        found = norms.measure(context.model, weights) if recorded else None
        self.lr = float(context.schedule.get_last_lr()[0])
        if not self._precision.step(context.optimizer):
            return None
        context.schedule.step()
        if self.average is not None:
            self.average.update_parameters(context.model)
        return found and {name: (w, g / scale) for name, (w, g) in found.items()}

    def _backward(self, batch: Batch, meter: Meter) -> None:
        config, world = self._context.config, self._context.world
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


def _overlap(ddp: DistributedDataParallel, context: TrainingContext) -> None:
    """Step the parameters of a bucket as soon as it has arrived; what does not go is an error."""
    wanted = context.config.compression
    compression: Any = None if wanted == "none" else wanted
    optimizer: Any = context.optimizer  # overlap refuses what is not fastlars'
    with context.world.raise_on_all_ranks():
        try:
            overlap(ddp, optimizer, compression=compression)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TrainerError(f"--overlap: {one_line(error)}") from error
