"""overlap(): step an optimizer during the backward pass of a DDP module."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from fastlars.distributed.averaging import COMPRESSIONS, BucketAverager
from fastlars.distributed.engine import Engine
from fastlars.distributed.hook import HookState, hook_state_of, reduce_and_step
from fastlars.distributed.validation import check_ddp, check_join, check_optimizer
from fastlars.optim.base import FusedOptimizer, inner_optimizer

MODES = ("step", "norms")


class Handle:
    """Returned by ``overlap()``; ends the overlap. A copied or unpickled handle does nothing."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine

    def __reduce__(self) -> Any:
        return Handle, (None,)

    def remove(self) -> None:
        """Go back to ordinary steps; a second call does nothing.

        Called between a backward pass and its ``optimizer.step()``, it lets that step still be
        overlapped. DDP keeps overlap's hook, which from then on averages gradients as DDP does
        without a hook. After a backward pass that ended in an error, the call waits for the buckets
        that are being reduced: make it before you load a checkpoint.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            return
        if engine.is_under_way():
            engine.leaving = True
            return
        with suppress(Exception):  # backward itself has raised the error
            engine.wait()  # else buckets of a failed backward pass could be stepped later
        engine.release()


def overlap(
    ddp: DistributedDataParallel,
    optimizer: FusedOptimizer,
    *,
    compression: Literal["fp16", "bf16"] | None = None,
    mode: Literal["step", "norms"] = "step",
    debug: bool = False,
) -> Handle:
    """Step the parameters of a DDP bucket as soon as it is reduced, while backward goes on.

    Call it once, before the first backward pass; the training loop stays as it is.
    ``optimizer.step()`` steps the parameters that were in no bucket. Without compression,
    parameters and states have the bits that they have without overlap. The first two steps are not
    overlapped.

    Hyper-parameters are read during backward: change them before it or after ``optimizer.step()``,
    as schedulers do. Parameters change while backward runs, and are new when it returns: after an
    error in it, some may be a step ahead of others, so go on from a checkpoint. All that overlap
    relies on is in docs/distributed.md, "What overlap relies on".

    Args:
        ddp: the DDP module whose gradients are reduced; all of its options work except those listed
            under Raises. With ``static_graph=True``, parameters may stay unused.
        optimizer: the :class:`fastlars.LARS`, :class:`fastlars.LAMB`, :class:`fastlars.LANS` or
            :class:`fastlars.RMSpropWarmup` that steps parameters of ``ddp``; it may have others as
            well. Or a wrapper around one, as of Lightning, Fabric and Accelerate.
        compression: type in which gradients travel. ``"fp16"`` and ``"bf16"`` divide them by the
            number of processes, round them to that type and add them up in it, which halves the
            traffic of float32 gradients; buckets of 16 bits stay as they are. Default None, no
            rounding. Set it where the network limits the step; ``"bf16"`` has the range of float32,
            ``"fp16"`` rounds less. The step reads the sums, and not ``p.grad``: of parameters that
            were stepped during backward, that holds this process's own gradient.
        mode: ``"step"`` (default) steps buckets during backward. ``"norms"`` changes weights and
            states only in ``optimizer.step()``, which sees what was changed after backward: during
            it LARS takes its sums of squares, the others nothing. Set it where
            something, a ``GradScaler`` for example, must run between backward and step. With
            ``max_grad_norm`` in any group, or ``skip_if``, both modes take the norms of gradients
            during backward, and write nothing then.
        debug: True makes in every step the checks that are otherwise made in the first ten: that no
            weight, gradient or state was changed through ``.data`` between backward and
            ``optimizer.step()``, and that backward reads no weight after its step. Default False.
            Set it where results with and without overlap differ.

    Returns:
        A handle, whose ``remove()`` goes back to ordinary steps.

    Raises:
        TypeError: ``ddp`` is not a DDP module, or ``optimizer`` not one of fastlars.
        ValueError: an unknown ``compression`` or ``mode``, or no parameter in common.
        RuntimeError: something that overlap does not support: ``find_unused_parameters`` without
            ``static_graph``, DDP's ``mixed_precision``, another communication hook,
            ``torch.compile``'s python reducer, an optimizer in backward, ``capturable``,
            ``stochastic_rounding``. Raised later, where it shows:
            ``join(divide_by_initial_world_size=False)``; and where buckets are stepped during
            backward, a ``GradScaler``, a second backward pass before ``optimizer.step()`` without
            ``no_sync()``, a backward pass that failed, weights that backward reads late, and
            gradients, weights, states or hyper-parameters that were changed between backward and
            ``optimizer.step()``. If a program does one of these from its first step, nothing was
            changed when the error is raised. If it begins later, buckets of that step were stepped
            already: go on from a checkpoint.

    Example:
        >>> import os, tempfile, torch, torch.distributed as dist, fastlars.distributed
        >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> w = torch.nn.init.ones_(model.weight)
        >>> ddp = torch.nn.parallel.DistributedDataParallel(model)
        >>> optimizer = fastlars.LARS(ddp.parameters(), lr=5.0, momentum=0.0)
        >>> handle = fastlars.distributed.overlap(ddp, optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     ddp(torch.ones(3, 4)).mean().backward()  # all gradients are 1: w shrinks by lr eta
        ...     print(round(w[0, 0].item(), 6), end=" ")
        ...     optimizer.step()
        ...     print(round(w[0, 0].item(), 6))
        1.0 0.995
        0.995 0.990025
        0.985075 0.985075
        >>> handle.remove()
        >>> dist.destroy_process_group()
    """
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression must be None, 'fp16' or 'bf16', got {compression!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    check_ddp(ddp)
    optimizer = inner_optimizer(optimizer)
    check_optimizer(optimizer, ddp)
    state = _registered_state(ddp)
    assert state.averager is not None
    engine = Engine(ddp, optimizer, state.averager, COMPRESSIONS[compression], mode, debug)
    for registered in (ddp._forward_pre_hooks, ddp._forward_hooks):
        # A copied module has copies of these hooks already.
        for key, hook in list(registered.items()):
            if hook in (_before_forward, _after_forward):
                del registered[key]
    hooks = (
        ddp.register_forward_pre_hook(_before_forward),
        ddp.register_forward_hook(_after_forward),
    )
    state.engine = engine
    optimizer.overlap_hook = engine

    def release() -> None:
        for hook in hooks:
            hook.remove()
        if state.engine is engine:
            state.engine = None
            optimizer.overlap_hook = None
        engine.close()

    engine.release = release
    return Handle(engine)


def _before_forward(ddp: torch.nn.Module, _: Any) -> None:
    if (engine := _engine_of(ddp)) is not None:
        check_join(engine.ddp)


def _after_forward(ddp: torch.nn.Module, _: Any, outputs: Any) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if (engine := _engine_of(ddp)) is not None:
        engine.watch(outputs)


def _engine_of(ddp: torch.nn.Module) -> Engine | None:
    """The engine of ``ddp``; None for a copied module, which has these hooks but no overlap."""
    state = hook_state_of(ddp)
    return state.engine if state is not None else None


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
