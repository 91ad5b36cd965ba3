"""The overlap with DDP: hooks on the module, and the communication hook with its engine."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from fastlars.distributed.averaging import BucketAverager
from fastlars.distributed.engine import DdpEngine
from fastlars.distributed.hook import HookState, hook_state_of, reduce_and_step
from fastlars.distributed.validation import check_ddp, check_groups
from fastlars.in_backward.handle import attach
from fastlars.in_backward.validation import shared_parameters
from fastlars.optim.base import FusedOptimizer


def overlap_ddp(
    ddp: Any,
    optimizer: FusedOptimizer,
    dtype: torch.dtype | None,
    mode: str,
    debug: bool,
) -> DdpEngine:
    """See ``fastlars.distributed.overlap``; ``dtype`` is that of the compression."""
    check_ddp(ddp)
    optimizer, _ = shared_parameters(optimizer, ddp, "overlap")
    check_groups(optimizer)
    state = _registered_state(ddp)
    assert state.averager is not None
    engine = DdpEngine(ddp, optimizer, state.averager, dtype, mode, debug)
    attach(engine, ddp)
    state.engine, release = engine, engine.release

    def release_hook() -> None:
        if state.engine is engine:
            state.engine = None
        release()

    engine.release = release_hook
    return engine


def _registered_state(ddp: DistributedDataParallel) -> HookState:
    """The state of overlap's hook on ``ddp``; registers the hook if there is none."""
    hooks = ddp._comm_hooks
    state = hook_state_of(ddp)
    if state is not None and state.engine is not None:
        raise RuntimeError("this DDP module is overlapped already: remove() its handle first")
    if state is not None:
        return state
    # A copied module lists the hook of the original without having registered it.
    hooks[:] = [pair for pair in hooks if not isinstance(pair[1], HookState)]
    if hooks:
        raise RuntimeError(
            "overlap does not go with another communication hook: DDP accepts only one, and has "
            f"{getattr(hooks[0][0], '__qualname__', hooks[0][0])}"
        )
    averager = BucketAverager(ddp)
    state = HookState(averager)
    try:
        ddp.register_comm_hook(state, reduce_and_step)
    except RuntimeError as error:
        hooks.clear()  # DDP lists a hook before its reducer refuses it
        averager.close()
        raise RuntimeError(
            "overlap does not go with another communication hook: DDP accepts only one, and has a "
            "built-in hook"
        ) from error
    return state
