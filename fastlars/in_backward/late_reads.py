"""Finds weights that Python code of a backward pass reads after their gradients are complete.

Autograd raises an error if a step has overwritten a tensor that autograd itself has saved. It does
not know what Python code reads during backward, as activation checkpointing does when it computes a
segment again, or a custom function that keeps a weight as an attribute. If such code reads a weight
after its bucket was stepped, gradients are silently wrong. Looking for these reads costs about
10 us for each node of the graph, so it is done only in the first steps and with ``debug=True``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel.distributed import _find_tensors
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Nodes that read no weights: those of autograd itself, those that run no Python code, and those of
# modules' backward hooks, which mostly log.
_UNWATCHED = ("AccumulateGrad", "CompiledFunctionBackward", "BackwardHookFunctionBackward")


def nodes_of(outputs: Any) -> set[Any]:
    """The nodes of the graph that have computed these outputs, found the way that DDP does."""
    return {t.grad_fn for t in _find_tensors(outputs) if t.grad_fn is not None}


class LateReads(TorchFunctionMode):
    """Records the parameters that are read after their gradients were accumulated.

    Attributes:
        arrived: parameters whose gradients were accumulated since ``forget``.
        late: parameters that were read later in the same backward pass.
        paused: True while code of fastlars runs, whose reads do not count.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__()
        self.arrived: set[Tensor] = set()
        self.late: set[Tensor] = set()
        self.paused = False
        # By storage: parameters whose gradients were accumulated since the last forward pass.
        self._arrived_by_storage: dict[int, list[Tensor]] = {}
        self._handles = [
            p.register_post_accumulate_grad_hook(self._arrive) for p in params if p.requires_grad
        ]

    def _arrive(self, p: Tensor) -> None:
        self.arrived.add(p)
        self._arrived_by_storage.setdefault(p.untyped_storage()._cdata, []).append(p)

    def watch(self, outputs: Any) -> None:
        """Watch the backward pass of these outputs of a forward pass."""
        self._arrived_by_storage.clear()
        nodes: list[Any] = list(nodes_of(outputs))
        seen = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if not node.name().endswith(_UNWATCHED):
                node.register_prehook(self._enter)
                node.register_hook(self._leave)

    # If a node raises, _leave does not run: autograd itself restores the modes of its threads after
    # each node.
    def _enter(self, _: Any) -> None:
        self.__enter__()

    def _leave(self, *_: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        # Access to an attribute reads no elements. What .data returns shares the storage, and so is
        # recognised when it is read.
        watching = self._arrived_by_storage and not self.paused
        if watching and getattr(func, "__name__", "") != "__get__":
            for value in tree_leaves((args, kwargs)):
                self.late.update(self._arrived_in_storage_of(value))
        return func(*args, **(kwargs or {}))

    def _arrived_in_storage_of(self, value: Any) -> list[Tensor]:
        """The parameters in the storage of a tensor whose gradients were accumulated already."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return []
        try:
            return self._arrived_by_storage.get(value.untyped_storage()._cdata, [])
        except (NotImplementedError, RuntimeError):
            return []  # a wrapper without memory, such as vmap's: the wrapped tensor is read later

    def forget(self) -> None:
        """Forget what was recorded, before the next step."""
        self.arrived.clear()
        self.late.clear()
        self._arrived_by_storage.clear()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()
