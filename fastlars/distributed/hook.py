"""The communication hook that DDP calls for every bucket."""

# No `from __future__ import annotations`: DDP compares a hook's annotations with types, and would
# refuse strings.
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from fastlars.distributed.averaging import BucketAverager, first_value
from fastlars.distributed.engine import DdpEngine
from fastlars.distributed.validation import raise_python_reducer


@dataclass
class HookState:
    """State of the hook. DDP cannot remove its hook, so the state outlives the engines.

    A copied or unpickled DDP module lists the hook without having registered it. Its copy of the
    state therefore has no averager, and ``fastlars.distributed.overlap`` registers a new hook.
    """

    averager: Optional[BucketAverager] = None  # noqa: UP045
    engine: Optional[DdpEngine] = None  # noqa: UP045

    def __reduce__(self) -> Any:
        return HookState, ()


def hook_state_of(ddp: Any) -> Optional[HookState]:  # noqa: UP045
    """The state of the hook that overlap has registered on ``ddp``; None without one."""
    states = (state for _, state in ddp._comm_hooks if isinstance(state, HookState))
    return next((state for state in states if state.averager is not None), None)


def reduce_and_step(state: HookState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket; an engine, if there is one, also steps it."""
    if not isinstance(bucket, GradBucket):
        raise_python_reducer()
    if state.engine is not None:
        return state.engine.reduce(bucket)
    averager = state.averager
    assert averager is not None  # DDP calls only registered hooks, whose states have one
    return averager.start(averager.scale(bucket.buffer(), bucket)).then(first_value)
