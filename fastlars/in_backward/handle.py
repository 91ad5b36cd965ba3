"""Handles, and attach(): an engine takes the steps of its optimizer until one is removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlars.in_backward.engine import Engine

if TYPE_CHECKING:
    from fastlars.in_backward.freeing import BackwardEngine


class Handle:
    """Ends the steps during backward. A copied or unpickled handle does nothing."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine

    def __reduce__(self) -> Any:
        return type(self), (None,)

    def remove(self) -> None:
        """Go back to ordinary steps; a second call does nothing.

        Called between a backward pass and its ``optimizer.step()``, it takes effect after that
        step. After a backward pass that ended in an error, call it, and ``zero_grad()``, before you
        load a checkpoint. To drop the handle or the optimizer without this call removes nothing.

        DDP keeps overlap's hook, which from then on averages gradients as DDP does without a hook.
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


class BackwardHandle(Handle):
    """Returned by ``fastlars.step_in_backward``. A copied or unpickled handle does nothing."""

    _engine: BackwardEngine | None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let gradients add up in ``p.grad``, in all backward passes of a step but the last.

        Example:
            >>> import torch, fastlars
            >>> w = torch.nn.Linear(4, 1, bias=False)
            >>> _ = torch.nn.init.ones_(w.weight)
            >>> optimizer = fastlars.LARS(w.parameters(), lr=5.0)
            >>> handle = fastlars.step_in_backward(w, optimizer)
            >>> with handle.accumulate():
            ...     w(torch.ones(4)).backward()
            >>> w.weight.grad.tolist()
            [[1.0, 1.0, 1.0, 1.0]]
            >>> w(torch.ones(4)).backward()
            >>> optimizer.step()
        """
        engine = self._engine
        if engine is None:
            yield
            return
        engine.check_accumulates()
        before, engine.accumulates = engine.accumulates, True
        try:
            yield
        finally:
            engine.accumulates = before

    @contextmanager
    def norm_pass(self) -> Iterator[None]:
        """Only measure the norm of the gradients in the backward pass inside, and free them.

        ``max_grad_norm`` and ``skip_if`` need the norm of all gradients before the first weight
        is written. A second pass through the same graph then steps, and measures nothing::

            with handle.norm_pass():
                loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()

        It costs one more backward pass, and saves the memory that gradients of all layers need.
        Where nothing needs the norm, the pass inside only frees the gradients. A model inside
        ``torch.compile`` needs ``torch._functorch.config.donated_buffer = False``, without which
        torch refuses a second pass.

        Raises:
            RuntimeError: a parameter has a gradient already, which the norm would not include: a
                clip and accumulated gradients do not go together here.
        """
        engine = self._engine
        if engine is None:
            raise RuntimeError("norm_pass() needs step_in_backward, which was removed")
        with engine.measuring():
            yield


class ForwardHooks:
    """Tell an engine of its module's forward passes. The hooks of a copied module do nothing."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine

    def __reduce__(self) -> Any:
        return ForwardHooks, (None,)

    def __bool__(self) -> bool:
        """Whether they belong to an engine."""
        return self._engine is not None

    def before(self, _: nn.Module, __: Any) -> None:
        if self._engine is not None:
            self._engine.before_forward()

    def after(self, _: nn.Module, __: Any, outputs: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._engine is not None:
            self._engine.watch(outputs)


def attach(engine: Engine, module: nn.Module) -> None:
    """Let the engine take the steps of its optimizer, until ``engine.release()``."""
    optimizer, hooks = engine.optimizer, ForwardHooks(engine)
    for registered in (module._forward_pre_hooks, module._forward_hooks):
        # A copied module has hooks that do nothing any more.
        for key, hook in list(registered.items()):
            if isinstance(owner := getattr(hook, "__self__", None), ForwardHooks) and not owner:
                del registered[key]
    handles = (
        # Before FSDP2's own hook, which starts the first all-gathers.
        module.register_forward_pre_hook(hooks.before, prepend=True),
        module.register_forward_hook(hooks.after),
    )
    optimizer.overlap_hook = engine

    def release() -> None:
        for handle in handles:
            handle.remove()
        if optimizer.overlap_hook is engine:
            optimizer.overlap_hook = None
        engine.close()

    engine.release = release
