"""Checks of options, parameters, gradients and states: messages name the group and parameter."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastlars.backends.base import is_dense
from fastlars.optim.dtensor import is_dtensor, local_tensor, plain_shard
from fastlars.optim.gradients import plain_gradients
from fastlars.optim.wrapped import is_plain
from fastlars.ranges import at_least_zero, flag, real
from fastlars.rules import Rule

FLAGS = frozenset(
    {"adapt", "always_adapt", "maximize", "master_weights", "stochastic_rounding", "capturable"}
)


def check_lr(lr: Any) -> None:
    """Raise unless ``lr`` is a finite number of at least 0, or a tensor of one element."""
    if type(lr) is float and 0.0 <= lr < math.inf:
        return
    if lr is None:
        raise TypeError("no lr: give one to the group, or one for all groups to the optimizer")
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.device.type != "cpu":
            return  # to read the value, the host would have to wait for the device
    at_least_zero("lr", lr)


def check_options(group: dict[str, Any]) -> None:
    """Raise unless the options of a group that its rule does not check are in range."""
    norm = group["max_grad_norm"]
    if norm is not None and not real("max_grad_norm", norm) > 0.0:
        raise ValueError(f"max_grad_norm must be positive, or None for no clip, got {norm}")
    for name in FLAGS & group.keys():
        flag(name, group[name])
    if group["fused_unscale"] is not None:
        flag("fused_unscale", group["fused_unscale"])
    if group["state_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"state_dtype must be torch.float32 or torch.bfloat16, got {group['state_dtype']}"
        )
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError(
            "stochastic_rounding is for weights without masters: choose one of the two"
        )
    if group["capturable"] and group["stochastic_rounding"]:
        raise ValueError(
            "stochastic_rounding does not go with capturable: every replay of a graph would round "
            "with the same random numbers"
        )


def checked_rule(rule_of: Callable[[dict[str, Any]], Rule], group: dict[str, Any]) -> Rule:
    """The rule made of a group's options; raises if an option is out of range."""
    check_lr(group["lr"])
    check_options(group)
    return rule_of(group)


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Put ``place`` in front of the message of a ValueError or TypeError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from None


def location(group: int, index: int, name: str | None = None) -> str:
    """The name of a parameter in messages."""
    return f"group {group}, parameter {index}" + (f" ({name})" if name else "")


def check_parameter(weight: Tensor, where: str) -> None:
    """Raise unless ``weight`` is a floating-point tensor with its own memory, or a shard of one."""
    if getattr(weight, "_fsdp_flattened", False):
        raise TypeError(
            f"{where} is a flat parameter of FSDP1, which does not know its layers: shard the "
            "model with FSDP2, torch.distributed.fsdp.fully_shard"
        )
    if is_dtensor(weight):
        _check_placement(weight, where)
    weight = plain_shard(weight)
    if weight.is_complex():
        raise TypeError(f"{where} is complex: step torch.view_as_real of it instead")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(f"{where} is {weight.dtype}: only floating-point parameters are stepped")
    if weight.layout != torch.strided:
        raise TypeError(
            f"{where} is a sparse tensor ({weight.layout}): only dense ones are stepped"
        )
    if weight.is_meta:
        raise TypeError(f"{where} is on the meta device, which has no memory to write")
    if not is_plain(weight):
        raise TypeError(
            f"{where} is a {type(weight).__name__}: a subclass is stepped only if "
            "AdamW(fused=True) would write one plain tensor, of the same shape, strides and type, "
            "that is an attribute of the subclass"
        )
    if weight.is_neg():
        raise TypeError(f"{where} is a lazily negated view: step a resolve_neg() of it instead")
    if weight.numel() > 0 and any(
        size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)
    ):
        raise ValueError(f"{where} is expanded: several of its elements share the same memory")


def _check_placement(weight: Any, where: str) -> None:
    if any(placement.is_partial() for placement in weight.placements):
        raise TypeError(f"{where} is a DTensor whose sum is pending, placed {weight.placements}")
    if weight.device_mesh.get_coordinate() is None:
        raise ValueError(f"{where} is a DTensor on {weight.device_mesh}, without this process")


def check_rounding(weight: Any, where: str) -> None:
    """Raise if ``weight`` has replicas, which would be rounded by different random numbers."""
    if is_dtensor(weight) and weight.dtype == torch.bfloat16:
        sizes = zip(weight.placements, weight.device_mesh.shape, strict=True)
        if any(placement.is_replicate() and size > 1 for placement, size in sizes):
            raise ValueError(
                f"{where} is replicated over a part of {weight.device_mesh}, and "
                "stochastic_rounding would round its replicas differently: use master_weights"
            )


def _check_same_mesh(weight: Any, other: Any, what: str, where: str) -> None:
    """Raise unless both are DTensors on the same mesh, or both are plain tensors."""
    if is_dtensor(weight) != is_dtensor(other):
        kinds = [f"a {'DTensor' if is_dtensor(t) else 'plain tensor'}" for t in (weight, other)]
        raise TypeError(f"{where} is {kinds[0]}, its {what} {kinds[1]}")
    if is_dtensor(weight) and weight.device_mesh != other.device_mesh:
        raise ValueError(f"{where} is on {weight.device_mesh}, its {what} on {other.device_mesh}")


def check_gradient(weight: Tensor, grad: Tensor, where: str) -> None:
    """Raise unless ``grad`` has an element for each element of ``weight``, on the same device."""
    _check_same_mesh(weight, grad, "gradient", where)
    if grad.layout != torch.strided:
        raise TypeError(f"{where} has a sparse gradient ({grad.layout}): only dense ones are taken")
    if not grad.is_floating_point():
        raise TypeError(f"{where} has a gradient of {grad.dtype}")
    plain = plain_gradients([local_tensor(grad)])[0]
    if not is_plain(plain):
        raise TypeError(f"{where} has a gradient of type {type(plain).__name__}")
    if grad.shape != weight.shape:
        raise ValueError(
            f"{where} has shape {tuple(weight.shape)}, its gradient {tuple(grad.shape)}"
        )
    if grad.device != weight.device:
        raise ValueError(f"{where} is on {weight.device}, its gradient on {grad.device}")


def check_state(weight: Tensor, name: str, value: Any, dtype: torch.dtype, where: str) -> None:
    """Raise unless a state has ``dtype``, and the present shape and device of ``weight``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: its {name} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{where}: its {name} is a sparse tensor ({value.layout})")
    _check_same_mesh(weight, value, name, where)
    placements = [getattr(t, "placements", None) for t in (weight, value)]
    if placements[0] != placements[1]:
        raise ValueError(
            f"{where} is placed {placements[0]}, its {name} {placements[1]}: "
            "the parameter was sharded anew after its state was made"
        )
    if value.shape != weight.shape:
        raise ValueError(
            f"{where} has shape {tuple(weight.shape)}, its {name} {tuple(value.shape)}: "
            "the parameter was replaced after its state was made"
        )
    if value.dtype != dtype:
        raise ValueError(
            f"{where} is {weight.dtype} and needs a {name} of {dtype}, but that is {value.dtype}: "
            "a type was changed after the state was made"
        )
    if value.device != weight.device:
        raise ValueError(
            f"{where} is on {weight.device}, its {name} on {value.device}: "
            "the model was moved after the optimizer took its first step"
        )


def check_counter(name: str, value: Any, where: str) -> None:
    """Raise unless a counter is a real number, or a tensor of one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{where}: its {name} must be one number, but has shape {tuple(value.shape)} and "
                f"is {value.dtype}"
            )
        return
    try:
        real(name, value)
    except TypeError:
        raise TypeError(f"{where}: its {name} is a {type(value).__name__}, not a tensor") from None


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((int(size) - 1) * int(stride) for size, stride in strides)
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return begin, begin + (last + 1) * tensor.itemsize


def check_shared_memory(parameters: list[tuple[Tensor, str]]) -> None:
    """Raise if two parameters share memory, or two elements of one parameter do.

    The shared memory would be stepped twice, or by two threads at once, with an undefined result.
    """
    by_storage: dict[int, list[tuple[Tensor, str]]] = defaultdict(list)
    for whole, where in parameters:
        if is_lazy(whole):
            continue  # it has no memory before the first forward pass
        parameter = plain_shard(whole)
        if parameter.layout == torch.strided and not parameter.is_meta and parameter.numel() > 0:
            by_storage[parameter.untyped_storage()._cdata].append((parameter, where))
    for sharers in by_storage.values():
        if len(sharers) == 1 and is_dense(sharers[0][0]):
            continue
        ranges = sorted((*_byte_range(p), i) for i, (p, _) in enumerate(sharers))
        apart = all(a[1] <= b[0] for a, b in pairwise(ranges))
        if not (apart and all(is_dense(p) for p, _ in sharers)):
            _check_elements(sharers)


def _check_elements(sharers: list[tuple[Tensor, str]]) -> None:
    """The exact check, for strided views. It is slow: it marks every byte of every element."""
    nbytes = sharers[0][0].untyped_storage().nbytes()
    owner = torch.full((nbytes,), -1, dtype=torch.int32, device="cpu")
    for i, (parameter, where) in enumerate(sharers):
        width = parameter.itemsize
        strides = [stride * width for stride in parameter.stride()]
        offset = parameter.storage_offset() * width
        mine = owner.as_strided((*parameter.shape, width), (*strides, 1), offset)
        taken = mine[mine >= 0]
        if taken.numel() > 0:
            raise ValueError(f"{where} shares memory with {sharers[int(taken[0])][1]}")
        mine.fill_(i)
        if int((owner == i).sum()) != parameter.numel() * width:
            raise ValueError(f"{where} is a view whose elements overlap in memory")
