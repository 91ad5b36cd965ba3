"""Tensor subclasses that keep their numbers in a plain tensor: where that one is.

FSDP2 lets a subclass decide what is gathered (``fsdp_pre_all_gather``, as torchao's float8 weights
do), and keeps shards that are such subclasses. torch's optimizers write to them through
``__torch_dispatch__``. A step here writes, without it, the tensor that AdamW(fused=True) would.
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
    """Whether a tensor's numbers lie in its own memory: its class leaves the dispatcher alone."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def path_inside(tensor: Tensor) -> Path:
    """The attributes that lead to the plain tensor with the numbers of a subclass.

    Empty for a plain tensor; and where no single plain tensor of the same shape, type, device and
    strides has the numbers, as in quantized ones.
    """
    if is_plain(tensor):
        return ()
    known = _known.get(tensor)
    if known is not None and _leads_to_plain(tensor, known):
        return known
    plain = inside([tensor])
    if len(plain) != 1 or _lies(plain[0]) != _lies(tensor):
        return ()
    _known[tensor] = path = _path(tensor, plain[0])
    return path


# By subclass tensor, because to look inside one takes 300 us.
_known = WeakIdKeyDictionary()


def _leads_to_plain(tensor: Tensor, path: Path) -> bool:
    try:
        plain = attrgetter(".".join(path))(tensor)
    except AttributeError:
        return False
    return isinstance(plain, Tensor) and is_plain(plain) and _lies(plain) == _lies(tensor)


# Subclasses inside each other that are looked through. Without a limit, a class that never unwraps
# would overflow the stack where torch.compile has raised Python's recursion limit.
DEEPEST = 8


class _Arrivals(TorchDispatchMode):
    """Notes the parameters of a fused AdamW when all subclasses are unwrapped, and runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.params: list[Tensor] = []
        self._unwrapped = 0  # calls that a subclass was left to unwrap

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types:
            self._unwrapped += 1
            if self._unwrapped > DEEPEST:
                raise TypeError  # the class calls with itself again, without an end
            return NotImplemented  # the subclass unwraps its tensors, and calls again
        if func is torch.ops.aten._fused_adamw_.default:
            self.params += args[0]
            return None
        if func._schema.is_mutable:
            raise TypeError  # nothing may be written by looking; the class is not taken
        return func(*args, **(kwargs or {}))


def inside(tensors: list[Tensor]) -> list[Tensor]:
    """The plain tensors that a fused AdamW writes when it is given ``tensors``."""
    one = torch.ones((), device=tensors[0].device)
    try:
        with torch.no_grad(), _Arrivals() as arrivals:
            # With found_inf nothing is written either, should a class get past the mode.
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
        return []  # the class has no fused AdamW, whatever it says
    return arrivals.params


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout


def _path(tensor: Tensor, plain: Tensor) -> Path:
    """The attributes from a subclass, through others inside it, to ``plain``; empty without any."""
    slots = (name for kind in type(tensor).__mro__ for name in getattr(kind, "__slots__", ()))
    for name in (*vars(tensor), *slots):
        value = getattr(tensor, name, None)
        if value is plain:
            return (name,)
        if isinstance(value, Tensor) and not is_plain(value) and (rest := _path(value, plain)):
            return (name, *rest)
    return ()
