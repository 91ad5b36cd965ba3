"""Entries of parameter groups that training scripts read: ``param_names`` and ``step``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastlars.ranges import at_least_zero

Group = dict[str, Any]


def pop_param_names(group: Any) -> list[str] | None:
    """Take the parameters' names out of a group that is to be added, and make ``params`` a list.

    torch refuses an optimizer in which some groups have names and others have none, and
    ``fastlars.parameter_groups`` adds names without being asked.
    """
    if not isinstance(group, dict):
        return None
    params = group.get("params")
    if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):
        params = group["params"] = list(params)
        if params and all(isinstance(p, tuple) and len(p) == 2 for p in params):
            group["params"] = [p for _, p in params]
            return [name for name, _ in params]
    return group.pop("param_names", None)


def ensure_step_count(group: Group, state: Any) -> None:
    """Make ``group["step"]`` an int, also before the first step.

    apex, timm and pytorch_optimizer count steps in their groups, and warm-ups written for them read
    the count. If the group has none, it becomes the highest count in the states of its parameters.
    """
    if group.get("step") is None:
        states = [state[p] for p in group["params"] if p in state]
        counts = [float(s["step"]) for s in states if s.get("step") is not None]
        group["step"] = max(counts, default=0)
    group["step"] = int(at_least_zero("step", group["step"]))


def count_step(group: Group, state: Any, host_knows: bool) -> None:
    """Add a step to ``group["step"]``.

    If the host does not know whether the device took the step, the entry becomes the counter tensor
    of one of the group's parameters, which the device advances.
    """
    step = group.get("step")
    if host_knows and step is not None and not isinstance(step, Tensor):
        group["step"] = int(step) + 1
    elif step is None:  # the groups were replaced by hand; the states have counted this step
        ensure_step_count(group, state)
    else:
        counters = (state[p].get("step") for p in group["params"] if p in state)
        group["step"] = next((c for c in counters if c is not None), step)
