"""attach(): lets an engine take the steps of its optimizer, until the handle is removed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from fastlars.in_backward.engine import Engine


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
