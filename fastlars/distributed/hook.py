"""The communication hook that DDP calls for every bucket."""

# DDP compares a hook's annotations with types: they must not be strings here.
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from fastlars.distributed.averaging import BucketAverager, first_value
from fastlars.distributed.engine import Engine
from fastlars.distributed.validation import raise_python_reducer


@dataclass
class HookState:
    """State of the hook. DDP keeps its hook for good; engines come and go.

    A copied or loaded DDP module lists its hooks, but has not registered them: a copy of the state
    has no averager, and :func:`fastlars.distributed.overlap` registers a new one.
    """

    averager: Optional[BucketAverager] = None  # noqa: UP045
    engine: Optional[Engine] = None  # noqa: UP045

    def __reduce__(self) -> Any:
        return HookState, ()


def hook_state_of(ddp: Any) -> Optional[HookState]:  # noqa: UP045
    """The state of the hook that is registered on ``ddp``, if overlap has registered one."""
    states = (state for _, state in ddp._comm_hooks if isinstance(state, HookState))
    return next((state for state in states if state.averager is not None), None)


def reduce_and_step(state: HookState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket; step it too where there is an engine."""
    if not isinstance(bucket, GradBucket):
        raise_python_reducer()
    if state.engine is not None:
        return state.engine.reduce(bucket)
    averager = state.averager
    assert averager is not None  # only states with one are registered
    return averager.start(averager.scale(bucket.buffer(), bucket)).then(first_value)
