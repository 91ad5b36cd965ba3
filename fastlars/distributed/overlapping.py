"""overlap(): do the work of a step during the backward pass of a DDP or FSDP2 module."""

from __future__ import annotations

import sys
from typing import Any, Literal

from torch import nn

from fastlars.distributed.averaging import COMPRESSIONS
from fastlars.distributed.ddp import overlap_ddp
from fastlars.in_backward.handle import Handle
from fastlars.optim.base import FusedOptimizer

MODES = ("step", "norms")


def overlap(
    module: nn.Module,
    optimizer: FusedOptimizer,
    *,
    compression: Literal["fp16", "bf16"] | None = None,
    mode: Literal["step", "norms"] = "step",
    debug: bool = False,
) -> Handle:
    """Step the parameters of a DDP bucket as soon as it is reduced, while backward goes on.

    Of a module that FSDP2 has sharded, the sums of squares of its shards are taken as soon as they
    are reduced; ``optimizer.step()`` then all-reduces all sums at once, and writes the weights.

    Call it once, before the first backward pass; the training loop stays as it is.
    ``optimizer.step()`` steps the parameters that were in no bucket. Without compression,
    parameters and states have the bits that they have without overlap. The first two steps are not
    overlapped.

    Hyper-parameters are read during backward: change them before it or after ``optimizer.step()``,
    as schedulers do. Parameters change while backward runs, and are new when it returns: after an
    error in it, some may be a step ahead of others, so go on from a checkpoint. All that overlap
    relies on is in docs/distributed.md, "What overlap relies on".

    Args:
        module: the DDP module whose gradients are reduced; all of its options work except those
            listed under Raises. With ``static_graph=True``, parameters may stay unused. Or the
            root of a model that ``torch.distributed.fsdp.fully_shard`` has sharded.
        optimizer: the ``fastlars.LARS``, ``fastlars.LAMB``, ``fastlars.LANS`` or
            ``fastlars.RMSpropWarmup`` that steps parameters of ``module``; it may have others as
            well. Or a wrapper around one, as of Lightning, Fabric and Accelerate.
        compression: type in which gradients travel. ``"fp16"`` and ``"bf16"`` divide them by the
            number of processes, round them to that type and add them up in it, which halves the
            traffic of float32 gradients; buckets of 16 bits stay as they are. Default None, no
            rounding. Set it where the network limits the step; ``"bf16"`` has the range of float32,
            ``"fp16"`` rounds less. The step reads the sums, and not ``p.grad``: of parameters that
            were stepped during backward, that holds this process's own gradient. For DDP alone:
            FSDP2 has ``MixedPrecisionPolicy(reduce_dtype=...)``.
        mode: ``"step"`` (default) steps buckets during backward. ``"norms"`` changes weights and
            states only in ``optimizer.step()``, which sees what was changed after backward: during
            it LARS takes its sums of squares, the others nothing. Set it where
            something, a ``GradScaler`` for example, must run between backward and step. With
            ``max_grad_norm`` in any group, or ``skip_if``, both modes take the norms of gradients
            during backward, and write nothing then. Under FSDP2 ``"step"`` never writes weights
            during backward, but LAMB's moments, with which its norms are measured.
        debug: True makes in every step the checks that are otherwise made in the first ten: that no
            weight, gradient or state was changed through ``.data`` between backward and
            ``optimizer.step()``, and that backward reads no weight after its step. Default False.
            Set it where results with and without overlap differ.

    Returns:
        A handle, whose ``remove()`` goes back to ordinary steps.

    Raises:
        TypeError: ``module`` is no DDP or FSDP2 module, or ``optimizer`` not one of fastlars.
        ValueError: an unknown ``compression`` or ``mode``, ``compression`` with FSDP2, or no
            parameter in common.
        RuntimeError: something that overlap does not support: ``find_unused_parameters`` without
            ``static_graph``, DDP's ``mixed_precision``, another communication hook,
            ``torch.compile``'s python reducer, an optimizer in backward, ``capturable``. Raised
            later, where it shows:
            ``join(divide_by_initial_world_size=False)``; and where buckets are stepped during
            backward, a ``GradScaler``, a second backward pass before ``optimizer.step()`` without
            ``no_sync()``, a backward pass that failed, weights that backward reads late, and
            gradients, weights, states or hyper-parameters that were changed between backward and
            ``optimizer.step()``. If a program does one of these from its first step, nothing was
            changed when the error is raised. If it begins later, buckets of that step were stepped
            already: go on from a checkpoint. Under FSDP2 these later errors are for LAMB with
            ``mode="step"``, which advances moments during backward; the earlier ones are for DDP.

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
    if not _is_fsdp(module):
        return Handle(overlap_ddp(module, optimizer, COMPRESSIONS[compression], mode, debug))
    if compression is not None:
        raise ValueError(
            "compression is for DDP: FSDP2 reduces in the reduce_dtype of its MixedPrecisionPolicy"
        )
    from fastlars.distributed.fsdp import overlap_fsdp  # imports FSDP2, which takes a second

    return Handle(overlap_fsdp(module, optimizer, mode, debug))


def _is_fsdp(module: Any) -> bool:
    """Whether ``fully_shard`` has sharded the module, without importing FSDP2 to see it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
