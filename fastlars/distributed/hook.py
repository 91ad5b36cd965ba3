"""The communication hook that DDP calls for every bucket."""

# DDP compares a hook's annotations with types: they must not be strings here.
from dataclasses import dataclass
from typing import Optional

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from fastlars.distributed.average import Average, first_value
from fastlars.distributed.engine import Engine


@dataclass
class Slot:
    """What the hook works for. DDP keeps its hook for good; the engine comes and goes."""

    average: Average
    engine: Optional[Engine] = None  # noqa: UP045


def reduce_and_step(slot: Slot, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket; step it too where there is an engine."""
    if not isinstance(bucket, GradBucket):
        raise RuntimeError(
            "overlap does not go with torch.compile's python reducer, which has no buckets: set "
            'torch._dynamo.config.optimize_ddp = "ddp_optimizer" before DDP is made'
        )
    if slot.engine is not None:
        return slot.engine.reduce(bucket)
    return slot.average.start(slot.average.scale(bucket.buffer(), bucket)).then(first_value)
