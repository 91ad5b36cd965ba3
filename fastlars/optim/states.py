"""The states of a parameter: names, types and memory layout, and how missing states are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlars.optim.dtensor import empty_like, local_tensor, plain_shard
from fastlars.optim.wrapped import is_plain
from fastlars.ranges import real
from fastlars.rules import Rule

States = dict[Tensor, dict[str, Any]]
LOW_PRECISION = (torch.float16, torch.bfloat16)
# States that describe how the last step left a weight or its buffer. A step that does not use them
# makes them wrong.
DROPPED_IF_UNUSED = frozenset({"master", "last_lr"})


def state_dtype(weight: Tensor, group: dict[str, Any]) -> torch.dtype:
    """Momentum and moments are float64 for float64 weights, else what the group asks for."""
    dtype: torch.dtype = group["state_dtype"]
    return torch.float64 if weight.dtype == torch.float64 else dtype


def counter_dtype(weight: Tensor) -> torch.dtype:
    """Type of the state with one number, which the compiled back ends read as float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def has_master(weight: Tensor, group: dict[str, Any]) -> bool:
    """Whether ``weight`` is stepped through a float32 master."""
    return bool(group["master_weights"]) and weight.dtype in LOW_PRECISION


def state_dtypes(weight: Tensor, rule: Rule, group: dict[str, Any]) -> dict[str, torch.dtype]:
    """Names and types of the states of ``weight`` that have its shape."""
    dtypes = dict.fromkeys(rule.states, state_dtype(weight, group))
    if has_master(weight, group):
        dtypes["master"] = torch.float32
    return dtypes


def copy_with_layout(weight: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` with the device and the strides of ``weight``; a DTensor is sharded alike."""
    # empty_like keeps the strides of a weight without gaps, and kernels pair elements by strides.
    out = empty_like(weight, dtype)
    plain_shard(out).copy_(plain_shard(value))
    return out


def lacks_states(group: dict[str, Any], rule: Rule, states: States) -> bool:
    """Whether the next step of a group has states to make."""
    counter = () if rule.counter is None else (rule.counter,)
    return any(
        states.get(p, {}).get(name) is None
        for p in group["params"]
        if p.grad is not None
        for name in (*state_dtypes(p, rule, group), *counter)
    )


def drop_stale_states(
    weight: Tensor, rule: Rule, group: dict[str, Any], states: dict[str, Any]
) -> None:
    """Drop the states of ``weight`` that the coming step does not use, and so leaves stale."""
    for name in DROPPED_IF_UNUSED - {*state_dtypes(weight, rule, group), rule.counter}:
        states.pop(name, None)


def make_states(p: Tensor, rule: Rule, group: dict[str, Any], states: dict[str, Any]) -> None:
    """Make the states of ``p`` that are missing; give those of a checkpoint the layout of ``p``."""
    drop_stale_states(p, rule, group, states)
    # None is how torch's SGD writes a momentum that was reset.
    fresh = [name for name in rule.states if states.get(name) is None]
    for name, dtype in state_dtypes(p, rule, group).items():
        value = states.get(name)
        if value is None:
            # A zero on the host would be expanded there, and sent to the device in full.
            zero = torch.zeros((), dtype=dtype, device=p.device)
            start = p.detach() if name == "master" else zero
            states[name] = copy_with_layout(p, start, dtype)
        elif (
            not is_plain(local_tensor(value))
            or plain_shard(value).stride() != plain_shard(p).stride()
        ):
            states[name] = copy_with_layout(p, value, dtype)
    counter = rule.counter
    if counter is None:
        return
    dtype, count = counter_dtype(p), states.get(counter)
    if len(fresh) == len(rule.states):
        count = rule.NEVER_STEPPED
    elif count is None:
        count = 0.0  # state loaded without last_lr: 0 disables momentum correction for one step
    # A 0-dim tensor, as in torch.optim: checkpoints keep it, and a device can advance it by itself.
    if not (isinstance(count, Tensor) and count.dim() == 0 and count.dtype == dtype):
        count = torch.full((), real(counter, count), dtype=dtype, device=p.device)
    states[counter] = count.to(p.device)
