"""A device of torch's that has no float64, "singles:0", run by the CPU. For a process of its own.

Every operator on its tensors runs on CPU tensors that stand for them. It fails, in the words of
torch's xpu on Intel's Arc A, where a tensor on the device is float64, or where torch would convert
to or from float64 on the device. With ``HOLDS``, float64 tensors can be made there all the same,
and what computes with them fails: so does xpu. Without, none can be made, as on Apple's mps.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

HOLDS = os.environ.get("FASTLARS_TEST_HOLDS_FLOAT64") == "1"
_setup_privateuseone_for_python_backend("singles")
DEVICE = torch.device("singles:0")
# The CPU tensors, by the address of the storage, which detach() and Parameter() share. No tensor of
# the device is ever freed, so that no storage gets the address of another.
_by_storage: dict[int, Tensor] = {}
_kept: list[Tensor] = []
calls: list[str] = []


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == DEVICE.type


def on_cpu(value: Any) -> Any:
    """The CPU tensor that stands for a tensor on the device; any other value unchanged."""
    if not _is_here(value):
        return value
    found = _by_storage[value.untyped_storage()._cdata]
    return found if found.dtype == value.dtype else found.view(value.dtype)


def _made(value: Tensor) -> Tensor:
    out: Tensor = torch._C._acc.create_empty_tensor(value.shape, value.dtype)  # type: ignore[attr-defined]
    assert value.is_contiguous(), "create_empty_tensor knows no strides"
    _by_storage[out.untyped_storage()._cdata] = value
    _kept.append(out)
    return out


def _refuse(name: str, *values: Any) -> None:
    if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in values):
        raise RuntimeError(f"Required aspect fp64 is not supported on the device ({name})")


def _arguments(operator: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments on the CPU. torch hands numbers over as such, also in the place of tensors."""
    kinds = [str(argument.type) for argument in operator._schema.arguments]
    return [
        torch.tensor(value) if kind == "Tensor" and isinstance(value, (int, float)) else value
        for kind, value in zip(kinds, tree_map(on_cpu, list(args)), strict=False)
    ]


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    name = operator.name()
    calls.append(name)
    places = [value for value in tree_leaves((args, kwargs)) if _is_here(value)]
    if name == "aten::_copy_from":
        source, target = args[:2]
        # torch converts on the device of the source.
        if _is_here(source) and source.dtype != target.dtype:
            _refuse(name, source, target)
        on_cpu(target).copy_(on_cpu(source))
        return target
    makes = name.startswith("aten::empty")
    if not (makes and HOLDS):
        _refuse(name, *places)
    device = kwargs.get("device")
    if device is not None and device.type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    stand_ins = {id(on_cpu(value)): value for value in places}
    out = operator(*_arguments(operator, args), **tree_map(on_cpu, kwargs))
    if not (makes and HOLDS):
        _refuse(name, *tree_leaves(out))

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return stand_ins[id(value)] if id(value) in stand_ins else _made(value)

    return tree_map(back, out)


_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(_run, "PrivateUse1")
# torch's own abs() resizes an empty tensor, which one of _made cannot be.
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("abs", partial(_run, torch.ops.aten.abs.default), "PrivateUse1")
