"""Launches kernels with little work on the host.

Triton looks at every argument of every call, to find the kernel that was compiled for arguments of
their kind; this takes longer than the launch itself. Here Triton is asked once for each kind, and
the compiled kernel is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from triton.runtime.interpreter import InterpretedFunction

from fastlars.backends.triton import compile_lock, sums

Launch: TypeAlias = Callable[[], None]
# By kernel, kind and device, for the whole process: a model whose gradients come and go makes many
# plans, each with a Launcher of its own.
_compiled: dict[tuple[Any, Any, torch.device], Any] = {}


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: slow, but CPU tensors can be stepped."""
    return isinstance(sums.total, InterpretedFunction)


class Launcher:
    """Makes launches on one device; each kernel always runs the same number of programs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launches: dict[tuple[Any, Any], Callable[..., None]] = {}

    def __call__(
        self,
        kernel: Any,
        programs: int,
        kind: Any,
        options: dict[str, Any],
        arguments: tuple[Any, ...],
    ) -> Launch:
        """Compile a kernel if need be. Calling the result launches it on the current stream.

        Nothing is launched before: a caller with several launches makes all of them first, so that
        a kernel that does not compile leaves everything as it was.

        Args:
            kernel: a function with ``@triton.jit``.
            programs: how many of them run.
            kind: a hashable value that is the same in all calls for which Triton may use the same
                compiled kernel: it stands for all arguments whose values are compiled in. It is
                printed alike in all processes, which compile a kernel one after the other.
            options: Triton's, such as ``num_warps``.
            arguments: all of the kernel's, in order. Tensors begin on 16-byte boundaries.
        """
        launch = self._launches.get((kernel, kind))
        if launch is None:
            grid = (programs, 1, 1)
            if isinstance(kernel, InterpretedFunction):
                launch = partial(kernel[grid], **options)
            else:
                launch = self._compile(kernel, grid, kind, options, arguments)[grid]
            self._launches[kernel, kind] = launch
        return partial(launch, *arguments)

    def _compile(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        kind: Any,
        options: dict[str, Any],
        arguments: tuple[Any, ...],
    ) -> Any:
        key = kernel, kind, self._device
        if key not in _compiled:
            with compile_lock.alone(f"{kernel} {kind}"):
                _compiled[key] = kernel.warmup(*arguments, grid=grid, **options)
        return _compiled[key]
