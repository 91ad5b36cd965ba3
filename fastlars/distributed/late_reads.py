"""Which weights a backward pass reads after their gradients are there, unknown to autograd.

Autograd knows the tensors that it has saved, and raises where a step has overwritten one of them.
It does not know what Python code reads during backward: a checkpointed segment that is computed
again, a custom function that keeps a weight as an attribute. A weight that is read so after its
bucket was stepped gives wrong gradients without an error. Looking for such reads costs about 10 us
for each node of the graph, and is done in the first steps and with ``debug=True``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel.distributed import _find_tensors
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# What autograd does by itself, what runs without Python, and modules' hooks, which mostly log.
_UNWATCHED = ("AccumulateGrad", "CompiledFunctionBackward", "BackwardHookFunctionBackward")


class LateReads(TorchFunctionMode):
    """Notes the parameters that are read after their gradients were accumulated.

    Attributes:
        arrived: parameters whose gradients were accumulated since :meth:`forget`.
        late: parameters that were read after that, in the same backward pass.
        paused: while overlap's own code runs.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__()
        self.arrived: set[Tensor] = set()
        self.late: set[Tensor] = set()
        self.paused = False
        # By storage: parameters whose gradients were accumulated since the last forward pass.
        self._done: dict[int, list[Tensor]] = {}
        self._handles = [
            p.register_post_accumulate_grad_hook(self._arrive) for p in params if p.requires_grad
        ]

    def _arrive(self, p: Tensor) -> None:
        self.arrived.add(p)
        self._done.setdefault(p.untyped_storage()._cdata, []).append(p)

    def watch(self, outputs: Any) -> None:
        """Watch the backward pass of these outputs of a forward pass."""
        self._done.clear()
        left = [t.grad_fn for t in _find_tensors(outputs)]  # as DDP finds them
        seen = set()
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            if not node.name().endswith(_UNWATCHED):
                node.register_prehook(self._enter)
                node.register_hook(self._leave)

    # Threads of autograd restore their modes after each node, also after one that raises.
    def _enter(self, _: Any) -> None:
        self.__enter__()

    def _leave(self, *_: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        # Attributes are no reads of the elements, but for .data, whose result shares the storage.
        if self._done and not self.paused and getattr(func, "__name__", "") != "__get__":
            for value in tree_leaves((args, kwargs)):
                self.late.update(self._parameters(value))
        return func(*args, **(kwargs or {}))

    def _parameters(self, value: Any) -> list[Tensor]:
        """The parameters, of those whose gradients are there, that share a tensor's storage."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return []
        try:
            return self._done.get(value.untyped_storage()._cdata, [])
        except (NotImplementedError, RuntimeError):
            return []  # a wrapper without memory, such as vmap's: what it wraps is read later

    def forget(self) -> None:
        """Begin anew, for the next step."""
        self.arrived.clear()
        self.late.clear()
        self._done.clear()

    def close(self) -> None:
        """Leave the parameters alone."""
        for handle in self._handles:
            handle.remove()
