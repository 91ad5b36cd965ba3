"""Checks of what overlap does not support, made before it changes anything."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.nn.parallel import DistributedDataParallel

from fastlars.optim.base import FusedOptimizer

# Attributes of an optimizer that GradScaler sets for the time of a step.
_SET_BY_SCALER = ("grad_scale", "found_inf")


def check_ddp(ddp: Any) -> None:
    """Raise unless ``ddp`` is a DDP module that reduces all gradients by overlap's hook alone."""
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            "overlap needs a torch.nn.parallel.DistributedDataParallel module, "
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


def check_optimizer(optimizer: Any, ddp: DistributedDataParallel) -> None:
    """Raise unless ``optimizer`` is a fastlars optimizer that steps parameters of ``ddp``."""
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"overlap needs an optimizer of fastlars, got {type(optimizer).__name__}")
    if optimizer.overlap_hook is not None:
        raise RuntimeError(
            "this optimizer is overlapped already: remove() its handle first, which after a "
            "backward pass takes effect in optimizer.step()"
        )
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    if not any(p in stepped for p in ddp.parameters() if p.requires_grad):
        raise ValueError("the optimizer steps none of the DDP module's parameters")
    check_groups(optimizer)


def check_groups(optimizer: FusedOptimizer) -> None:
    """Raise if overlap does not support the options of a group."""
    for number, group in enumerate(optimizer.param_groups):
        if group["capturable"]:
            raise RuntimeError(
                f"group {number}: overlap does not go with capturable=True: a CUDA graph would "
                "record the reductions too"
            )
        if group["stochastic_rounding"]:
            raise RuntimeError(
                f"group {number}: overlap does not go with stochastic_rounding: random numbers "
                "would depend on the buckets"
            )


def has_scaler(optimizer: FusedOptimizer) -> bool:
    """Whether a GradScaler has passed its scale or its verdict to this step."""
    return any(getattr(optimizer, name, None) is not None for name in _SET_BY_SCALER)


def raise_scaler(optimizer: FusedOptimizer) -> None:
    """Raise the error for a GradScaler where buckets are stepped during backward."""
    for name in _SET_BY_SCALER:
        # After an error GradScaler does not remove them, and the next step would find them.
        vars(optimizer).pop(name, None)
    raise RuntimeError(
        "overlap does not go with GradScaler: buckets are stepped before it has seen all "
        'gradients. mode="norms" and max_grad_norm work with it, because they write nothing before '
        "optimizer.step(); bfloat16 needs no scaler"
    )


def raise_changed(what: str) -> None:
    """Raise the error for a tensor or option that was changed after overlap had used it."""
    advice = {
        "gradient": "For a global clip, or its norm alone (math.inf), set max_grad_norm. "
        'mode="norms" allows changed gradients',
        "weight": 'Change it before backward or after optimizer.step(), or set mode="norms"',
    }.get(what, "Change it before backward, or after optimizer.step()")
    raise RuntimeError(
        f"a {what} was changed between backward and optimizer.step(): overlap has used it already. "
        f"{advice}"
    )


def check_join(ddp: DistributedDataParallel) -> None:
    """Raise if DDP averages only over the processes that still have inputs."""
    if ddp._join_config.enable and not ddp._divide_by_initial_world_size:
        raise RuntimeError(
            "overlap does not go with join(divide_by_initial_world_size=False): a communication "
            "hook cannot know how many processes are left"
        )
