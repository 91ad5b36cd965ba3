"""The communication hook that DDP calls for every bucket."""

# DDP compares a hook's annotations with types: they must not be strings here.
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from fastlars.distributed.average import Average, first_value
from fastlars.distributed.engine import Engine
from fastlars.distributed.refusals import raise_python_reducer


@dataclass
class Slot:
    """State of the hook. DDP keeps its hook for good; engines come and go.

    A copied or loaded DDP module lists its hooks, but has not registered them: a copy of the slot
    has no average, and :func:`fastlars.distributed.overlap` registers a new one.
    """

    average: Optional[Average] = None  # noqa: UP045
    engine: Optional[Engine] = None  # noqa: UP045

    def __reduce__(self) -> Any:
        return Slot, ()


def slot_of(ddp: Any) -> Optional[Slot]:  # noqa: UP045
    """The slot of the hook that is registered on ``ddp``, if overlap has registered one."""
    slots = (state for _, state in ddp._comm_hooks if isinstance(state, Slot))
    return next((slot for slot in slots if slot.average is not None), None)


def reduce_and_step(slot: Slot, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket; step it too where there is an engine."""
    if not isinstance(bucket, GradBucket):
        raise_python_reducer()
    if slot.engine is not None:
        return slot.engine.reduce(bucket)
    average = slot.average
    assert average is not None  # only slots with one are registered
    return average.start(average.scale(bucket.buffer(), bucket)).then(first_value)
