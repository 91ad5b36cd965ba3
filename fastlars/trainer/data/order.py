"""Which image is used when: a pure function of seed, step and process.

One permutation an epoch is cut into global batches, each batch into the processes' shares and
each share into micro-batches (Goyal et al. 2017, remark 4). Nothing is drawn from a generator
whose state would have to be saved, so a run can go on from any step, and k processes see what one
process with k times as many micro-batches sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastlars.trainer.errors import TrainerError


@dataclass(frozen=True)
class BatchOrder:
    """The division of the training images into steps."""

    images: int
    batch_size: int
    micro_batch: int
    rank: int
    world_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only; what is left of one permutation has its turn in the next."""
        return self.images // self.batch_size

    @property
    def micro_batches(self) -> int:
        """Forward passes of one process for one optimizer step."""
        return self.batch_size // (self.world_size * self.micro_batch)

    def from_step(self, step: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(epoch, indices) of this process's micro-batches, from a step of the run on, for ever."""
        share = self.batch_size // self.world_size
        while True:
            epoch, at = divmod(step, self.steps_per_epoch)
            order = torch.randperm(self.images, generator=generator(self.seed, epoch))
            for position in range(at, self.steps_per_epoch):
                start = position * self.batch_size + self.rank * share
                for indices in order[start : start + share].split(self.micro_batch):
                    yield epoch, indices
            step = (epoch + 1) * self.steps_per_epoch


def make(
    images: int, batch_size: int, micro_batch: int, rank: int, world_size: int, seed: int
) -> BatchOrder:
    """A plan; a batch that the images or processes do not fit is an error."""
    if batch_size > images:
        raise TrainerError(
            f"--batch-size {batch_size} is more than the {images} training images there are"
        )
    if batch_size % world_size:
        raise TrainerError(f"--batch-size {batch_size} does not divide into {world_size} processes")
    share = batch_size // world_size
    micro_batch = micro_batch or share
    if share % micro_batch:
        raise TrainerError(
            f"--micro-batch {micro_batch} does not divide the {share} images that each of "
            f"{world_size} processes has of --batch-size {batch_size}"
        )
    if micro_batch < 2:
        raise TrainerError(
            "batch norm needs at least 2 images in a process's forward pass, got 1: set a larger "
            "--batch-size or --micro-batch"
        )
    return BatchOrder(images, batch_size, micro_batch, rank, world_size, seed)


def test_batches(images: int, size: int, rank: int, world_size: int) -> list[torch.Tensor]:
    """This process's part of the test images: every image once over all processes, no padding."""
    mine = torch.arange(images)[rank::world_size]
    return list(mine.split(size)) if len(mine) else []


def generator(seed: int, epoch: int) -> torch.Generator:
    """The random numbers of one epoch."""
    # Multiplied apart, so that epochs of one seed do not meet those of the next.
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
