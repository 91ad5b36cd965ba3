"""Launches kernels with little work on the host.

Triton looks at every argument of every call, to find the kernel that was compiled for arguments of
their kind; this takes longer than the launch itself. A :class:`Launcher` asks Triton once for each
kind, and keeps the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime.interpreter import InterpretedFunction

from fastlars.backends.triton import compile_lock, sums


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: slow, but CPU tensors can be stepped."""
    return isinstance(sums.total, InterpretedFunction)


class Launcher:
    """Launches kernels on one device, and each of them on one number of programs."""

    def __init__(self) -> None:
        self._launches: dict[tuple[Any, Any], Callable[..., None]] = {}

    def __call__(
        self,
        kernel: Any,
        programs: int,
        kind: Any,
        options: dict[str, Any],
        arguments: tuple[Any, ...],
    ) -> None:
        """Launch a kernel on the current stream of the current device.

        Args:
            kernel: a function with ``@triton.jit``.
            programs: how many of them run; the same for each call with this kernel.
            kind: a hashable value that is the same in all calls for which Triton may use the same
                compiled kernel: it stands for all arguments whose values are compiled in. It is
                printed alike in all processes, which compile a kernel one after the other.
            options: Triton's, such as ``num_warps``.
            arguments: all of the kernel's, in order. Tensors begin on 16-byte boundaries.
        """
        launch = self._launches.get((kernel, kind))
        if launch is None:
            with compile_lock.alone(f"{kernel} {kind}"):
                launch = _compiled(kernel, programs, options, arguments)
            self._launches[kernel, kind] = launch
        launch(*arguments)


def _compiled(
    kernel: Any, programs: int, options: dict[str, Any], arguments: tuple[Any, ...]
) -> Callable[..., None]:
    grid = (programs, 1, 1)
    if isinstance(kernel, InterpretedFunction):
        return lambda *given: kernel[grid](*given, **options)
    launch: Callable[..., None] = kernel.warmup(*arguments, grid=grid, **options)[grid]
    return launch
