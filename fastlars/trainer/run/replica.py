"""The model as every process trains it: gradients averaged, compiled, with a moving average."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastlars.distributed import overlap
from fastlars.trainer.errors import TrainerError, one_line
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.process.world import World


class Replica:
    """This process's copy of the model.

    Attributes:
        network: what a forward pass of the training calls: the model, under DDP where there are
            several processes.
        average: exponential moving average of weights and of batch norm's statistics, where --ema
            asks for one; its first update makes it equal to the model.
    """

    def __init__(self, context: TrainingContext) -> None:
        config = context.config
        self._model = context.model
        self.average: AveragedModel | None = None
        if config.ema:
            # Statistics of the latest weights would not fit averaged weights.
            moving = get_ema_multi_avg_fn(config.ema)
            self.average = AveragedModel(context.model, multi_avg_fn=moving, use_buffers=True)
        self.network = _parallel(context.model, context.world)
        if config.overlap and isinstance(self.network, DistributedDataParallel):
            _overlap(self.network, context)
        self._compiler_errors: tuple[type[Exception], ...] = ()
        if config.compile:
            # Compile DDP, not the model in it: the graph is then cut where a bucket of gradients
            # is full, which travels during the rest of the backward pass. In place, because a
            # compiled copy would change the names in checkpoints.
            self.network.compile()
            self._compiler_errors = (torch._dynamo.exc.TorchDynamoException,)

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the moving average, if there is one."""
        return self._model if self.average is None else self.average.module

    def all_reduce(self, *, last: bool) -> AbstractContextManager[Any]:
        """A backward pass in this context sends its gradients if its micro-batch is the last."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Turn errors of torch.compile, which compiles in the first passes, into one line."""
        try:
            yield
        except self._compiler_errors as error:
            # The paragraphs after the first say how to debug torch.
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise TrainerError(f"--compile: torch.compile failed: {reason}") from error


def _parallel(model: nn.Module, world: World) -> nn.Module:
    """The model, wrapped so that gradients are averaged over all processes.

    Buffers are not sent at every step: `batchnorm.share` makes them equal before an evaluation.
    """
    if world.size == 1:
        return model
    keywords = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.14 warns of the old name, broadcast_buffers, and torch 2.11 has only that one.
    name = "forward_sync_buffers" if "forward_sync_buffers" in keywords else "broadcast_buffers"
    devices = [world.device.index] if world.device.type == "cuda" else None
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, device_ids=devices, **options)


def _overlap(ddp: DistributedDataParallel, context: TrainingContext) -> None:
    """Step the parameters of each bucket as soon as its gradients have arrived."""
    wanted = context.config.compression
    compression: Any = None if wanted == "none" else wanted
    optimizer: Any = context.optimizer  # overlap refuses optimizers that are not fastlars'
    with context.world.raise_on_all_ranks():
        try:
            overlap(ddp, optimizer, compression=compression)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TrainerError(f"--overlap: {one_line(error)}") from error
