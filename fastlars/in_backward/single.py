"""step_in_backward(): step an optimizer during the backward pass of a module on one device."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fastlars.in_backward.freeing import BackwardEngine, check_no_ddp
from fastlars.in_backward.handle import BackwardHandle, attach
from fastlars.in_backward.validation import shared_parameters
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.dtensor import is_dtensor
from fastlars.ranges import real

MIB = 2**20


def step_in_backward(
    model: nn.Module,
    optimizer: FusedOptimizer,
    *,
    bucket_mb: float = 25.0,
    except_for: Iterable[Tensor] = (),
    debug: bool = False,
) -> BackwardHandle:
    """Step layers during backward as soon as their gradients are complete, and free the gradients.

    LARS, LAMB, LANS and RMSprop warm-up need nothing but a layer's own weights, gradients and
    states: weights and states have the same bits as after a backward pass and ``optimizer.step()``.
    (Only stochastic rounding can differ: in steps in which some parameters get no gradient, and
    where something else draws random numbers between a backward pass and its step.) Gradients of
    ``bucket_mb`` and the next parameter exist at the same time, instead of all; on a CPU, glibc
    gives their memory back where ``MALLOC_MMAP_THRESHOLD_=65536`` is set.

    Call it once, before the first backward pass; the training loop stays as it is.
    ``optimizer.step()`` steps what is left, counts the step, and makes the gradients None.
    Hyper-parameters are read during backward: change them before it or after ``optimizer.step()``,
    as schedulers do. Parameters change while backward runs, and are new when it returns: after an
    error in it, some may be a step ahead of others, so go on from a checkpoint.
    More in docs/distributed.md, "One device".

    Args:
        model: a module on one device, not inside DDP or FSDP; for those see
            ``fastlars.distributed.overlap``. It must be the one that is called, as ``model(...)``,
            and return tensors, or lists, dicts or dataclasses of tensors: else mistakes of the
            backward pass may go unnoticed. (In Lightning, the module that ``training_step`` calls.)
            It may be compiled: gradients that one graph computes are complete at the same time, at
            the end of its backward pass.
        optimizer: the ``fastlars.LARS``, ``fastlars.LAMB``, ``fastlars.LANS`` or
            ``fastlars.RMSpropWarmup`` that steps parameters of ``model``; it may have others as
            well. Or a wrapper around one, as of Lightning, Fabric and Accelerate.
        bucket_mb: how many MiB of gradients are gathered, above 0, before one call steps their
            parameters. Default 25. Less frees more memory; each call costs the host some 30 us.
        except_for: parameters of ``model`` that ``optimizer.step()`` steps, and whose gradients
            stay until then. Default none. For weights that backward reads again after their
            gradients are complete, and those whose gradients arrive in several parts, such as a
            weight shared by several segments of reentrant activation checkpointing.
        debug: True makes in every step the checks that are otherwise made in the first ten: that no
            weight or state was changed through ``.data`` between backward and ``optimizer.step()``,
            and that backward reads no weight after its step. Default False.

    Returns:
        A handle: ``remove()`` goes back to ordinary steps; ``accumulate()`` and ``norm_pass()`` are
        contexts for backward passes that do not step.

    Raises:
        TypeError: ``optimizer`` is not one of fastlars, or a parameter cannot be stepped.
        ValueError: ``bucket_mb`` is not positive, no parameter in common, or a parameter of
            ``except_for`` that the optimizer does not step.
        RuntimeError: a DDP module, or sharded parameters; parameters on several devices, or that
            another optimizer steps during backward. Raised later, where it shows:
            ``max_grad_norm`` or ``skip_if`` without a ``norm_pass()``; a ``GradScaler``; a second
            backward pass before ``optimizer.step()`` without ``accumulate()``; a use of a gradient
            that was freed; a backward pass that failed; a CUDA graph of a backward pass; compiled
            autograd; ``state_dict()`` before the step has ended; weights that backward reads late,
            and weights, states or hyper-parameters that were changed between backward and
            ``optimizer.step()``.

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> w = torch.nn.init.ones_(model.weight)
        >>> optimizer = fastlars.LARS(model.parameters(), lr=5.0, momentum=0.0)
        >>> handle = fastlars.step_in_backward(model, optimizer, bucket_mb=1e-6)
        >>> model(torch.ones(3, 4)).mean().backward()  # all gradients are 1: w shrinks by lr eta
        >>> w.grad, [round(x, 6) for x in w[0].tolist()]
        (ReleasedGradient(), [0.995, 0.995, 0.995, 0.995])
        >>> optimizer.step()
        >>> w.grad, [round(x, 6) for x in w[0].tolist()]
        (None, [0.995, 0.995, 0.995, 0.995])
    """
    bucket_mb = real("bucket_mb", bucket_mb)
    if not bucket_mb > 0.0:
        raise ValueError(f"bucket_mb must be positive, got {bucket_mb}")
    check_no_ddp(model)
    optimizer, params = shared_parameters(optimizer, model, "step_in_backward")
    if any(map(is_dtensor, params)):
        raise RuntimeError(
            "step_in_backward is for parameters that are not sharded: use "
            "fastlars.distributed.overlap"
        )
    if len(devices := {p.device for p in params}) > 1:
        raise RuntimeError(
            "step_in_backward needs all parameters on one device, got "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in params):
        raise RuntimeError(
            "step_in_backward does not go with _apply_optimizer_in_backward: two optimizers would "
            "step the same parameters"
        )
    if any(_is_hooked(p) for p in params):
        raise RuntimeError(
            "a parameter is stepped during backward by another optimizer already: remove() that "
            "handle first, or give each optimizer parameters of its own"
        )
    excluded = _excluded(except_for, params)
    optimizer.planner.check(
        optimizer.param_groups, optimizer.state, {p: p.detach() for p in params}
    )
    engine = BackwardEngine(model, optimizer, params, bucket_mb * MIB, excluded, debug)
    attach(engine, model)
    return BackwardHandle(engine)


def _is_hooked(p: Tensor) -> bool:
    """Whether an engine of an earlier call steps the parameter."""
    hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    return any(getattr(hook, "engine", None) is BackwardEngine for hook in hooks.values())


def _excluded(except_for: Iterable[Tensor], params: list[Tensor]) -> set[Tensor]:
    given = list(except_for)
    if isinstance(except_for, Tensor) or not all(isinstance(p, Tensor) for p in given):
        raise TypeError("except_for must be a list of parameters")
    if not set(given).issubset(params):
        raise ValueError(
            "except_for has a parameter that is not of the model, or that optimizer does not step"
        )
    return set(given)
