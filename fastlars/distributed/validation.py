"""Checks of what overlap does not support, made before it changes anything."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.nn.parallel import DistributedDataParallel

from fastlars.optim.base import FusedOptimizer


def check_ddp(ddp: Any) -> None:
    """Raise unless ``ddp`` is a DDP module that reduces all gradients by overlap's hook alone."""
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            "overlap needs a DistributedDataParallel module, or one that fully_shard has sharded, "
            f"got {type(ddp).__name__}"
        )
    if ddp._use_python_reducer:
        raise_python_reducer()
    if ddp.mixed_precision is not None:
        raise RuntimeError(
            "overlap does not go with DDP's mixed_precision, which has a communication hook of its "
            "own: use torch.autocast, or parameters of bfloat16 with master_weights=True"
        )
    if ddp.find_unused_parameters and not ddp.static_graph:
        raise RuntimeError(
            "overlap does not go with find_unused_parameters=True: which parameters are unused is "
            "known only after their zeros were averaged. If they are the same at every step, "
            "set static_graph=True"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.parameters()):
        raise RuntimeError(
            "overlap does not go with _apply_optimizer_in_backward: two optimizers would step "
            "the same parameters"
        )


def raise_python_reducer() -> NoReturn:
    """Raise the error for torch.compile's python reducer, which has no buckets."""
    raise RuntimeError(
        "overlap does not go with torch.compile's python reducer, which has no buckets: set "
        'torch._dynamo.config.optimize_ddp = "ddp_optimizer" before DDP is made'
    )


def check_groups(optimizer: FusedOptimizer) -> None:
    """Raise if overlap does not support the options of a group."""
    for number, group in enumerate(optimizer.param_groups):
        if group["capturable"]:
            raise RuntimeError(
                f"group {number}: overlap does not go with capturable=True: a CUDA graph would "
                "record the reductions too"
            )


def check_join(ddp: DistributedDataParallel) -> None:
    """Raise if DDP averages only over the processes that still have inputs."""
    if ddp._join_config.enable and not ddp._divide_by_initial_world_size:
        raise RuntimeError(
            "overlap does not go with join(divide_by_initial_world_size=False): a communication "
            "hook cannot know how many processes are left"
        )
