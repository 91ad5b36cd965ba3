"""Tensor subclasses that wrap a plain tensor: finding that tensor.

FSDP2 lets a subclass decide what is gathered (``fsdp_pre_all_gather``, as torchao's float8 weights
do), and its shards then are of that subclass. torch's optimizers write such a shard through its
``__torch_dispatch__``. A step here instead writes directly to the plain tensor that
AdamW(fused=True) would write.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

Path = tuple[str, ...]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its numbers in its own memory: its class overrides no dispatch."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def path_inside(tensor: Tensor) -> Path:
    """The attributes that lead from a subclass tensor to the plain tensor with its numbers.

    Empty for a plain tensor, and for a subclass without a plain tensor of the same shape, type,
    device and strides, such as a quantized one.
    """
    if is_plain(tensor):
        return ()
    known = _known_paths.get(tensor)
    if known is not None and _is_valid(known, tensor):
        return known
    plain = unwrap([tensor])
    if len(plain) != 1 or _layout(plain[0]) != _layout(tensor):
        return ()
    _known_paths[tensor] = path = _find_path(tensor, plain[0])
    return path


# By subclass tensor, because to unwrap one takes 300 us.
_known_paths = WeakIdKeyDictionary()


def _is_valid(path: Path, tensor: Tensor) -> bool:
    try:
        plain = attrgetter(".".join(path))(tensor)
    except AttributeError:
        return False
    return isinstance(plain, Tensor) and is_plain(plain) and _layout(plain) == _layout(tensor)


# Levels of nested subclasses that are unwrapped. Without a limit, a class that never unwraps itself
# would overflow the stack where torch.compile has raised Python's recursion limit.
MAX_DEPTH = 8


class _RecordFusedAdamW(TorchDispatchMode):
    """Records the parameters with which fused AdamW is called once all subclasses are unwrapped.

    AdamW itself is not run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.params: list[Tensor] = []
        self._unwrapped = 0  # calls that a subclass was left to unwrap

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types:
            self._unwrapped += 1
            if self._unwrapped > MAX_DEPTH:
                raise TypeError  # the class passes itself on instead of unwrapping
            return NotImplemented  # the subclass unwraps its tensors, and calls the operator again
        if func is torch.ops.aten._fused_adamw_.default:
            self.params += args[0]
            return None
        if func._schema.is_mutable:
            raise TypeError  # unwrapping must write nothing: refuse the class
        return func(*args, **(kwargs or {}))


def unwrap(tensors: list[Tensor]) -> list[Tensor]:
    """The plain tensors that fused AdamW would write for ``tensors``; empty if it refuses them."""
    one = torch.ones((), device=tensors[0].device)
    try:
        with torch.no_grad(), _RecordFusedAdamW() as recorded:
            # found_inf makes AdamW write nothing, in case a class bypasses the mode.
            torch._fused_adamw_(
                tensors,
                tensors,
                tensors,
                tensors,
                [],
                [one],
                lr=0.0,
                beta1=0.0,
                beta2=0.0,
                weight_decay=0.0,
                eps=0.0,
                amsgrad=False,
                maximize=False,
                found_inf=one,
            )
    except Exception:
        return []  # the class does not implement fused AdamW; it may raise any error to say so
    return recorded.params


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout


def _find_path(tensor: Tensor, plain: Tensor) -> Path:
    """The attributes that lead from a subclass tensor to ``plain``; empty if none do."""
    slots = (name for kind in type(tensor).__mro__ for name in getattr(kind, "__slots__", ()))
    for name in (*vars(tensor), *slots):
        value = getattr(tensor, name, None)
        if value is plain:
            return (name,)
        if isinstance(value, Tensor) and not is_plain(value) and (rest := _find_path(value, plain)):
            return (name, *rest)
    return ()
