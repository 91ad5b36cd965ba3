"""Which image is used when: a pure function of seed, step and process.

Each epoch's permutation is cut into global batches, each batch into the shares of the processes,
each share into micro-batches (Goyal et al. 2017, remark 4). No generator state has to be saved: a
run can be resumed at any step, and k processes see what one process with k times as many
micro-batches sees.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlars.trainer.errors import TrainerError


class BatchOrder:
    """The division of the training images into steps; TrainerError if the sizes do not fit.

    `batch_size` counts the images of one optimizer step, over all processes; `micro_batch` those of
    one forward pass, or the whole share of the process where 0 is given.

    Attributes:
        micro_batch: images of one forward pass, never 0.
        micro_batches: forward passes of one process for one optimizer step.
        steps_per_epoch: whole batches; the remaining images of a permutation are left out.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        if batch_size > images:
            raise TrainerError(f"--batch-size {batch_size} exceeds the {images} training images")
        if batch_size % world_size:
            raise TrainerError(
                f"--batch-size {batch_size} is not a multiple of {world_size} processes"
            )
        share = batch_size // world_size
        micro_batch = micro_batch or share
        if share % micro_batch:
            raise TrainerError(
                f"--micro-batch {micro_batch} does not divide the {share} images that each of "
                f"{world_size} processes has of --batch-size {batch_size}"
            )
        if micro_batch < 2:
            raise TrainerError(
                "batch norm needs 2 images in a forward pass: raise --batch-size or --micro-batch"
            )
        self.micro_batch = micro_batch
        self.micro_batches = share // micro_batch
        self.steps_per_epoch = images // batch_size
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._share, self._first = share, rank * share

    def from_step(self, step: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(epoch, indices) of this process's micro-batches from a step of the run on, endlessly."""
        while True:
            epoch, at = divmod(step, self.steps_per_epoch)
            order = torch.randperm(self._images, generator=generator(self._seed, epoch))
            for position in range(at, self.steps_per_epoch):
                start = position * self._batch_size + self._first
                for indices in order[start : start + self._share].split(self.micro_batch):
                    yield epoch, indices
            step = (epoch + 1) * self.steps_per_epoch


def test_batches(images: int, size: int, rank: int, world_size: int) -> list[torch.Tensor]:
    """This process's part of the test images: every image once over all processes, no padding."""
    share = torch.arange(images)[rank::world_size]
    return list(share.split(size)) if len(share) else []


def generator(seed: int, epoch: int) -> torch.Generator:
    """The random numbers of one epoch."""
    # The factor keeps the epochs of one seed apart from those of the next.
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
