"""What training scripts read off the optimizers that they know, shown by ours too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastlars.rules import at_least_zero

Group = dict[str, Any]


def take_names(group: Any) -> list[str] | None:
    """Make a list of the parameters of a group that is to be added, and take their names out.

    torch refuses groups with names next to groups without, and
    :func:`fastlars.parameter_groups` names parameters unasked.
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


def show_steps(group: Group, state: Any) -> None:
    """Let ``group["step"]`` be there, as an int, before the next step.

    apex, timm and pytorch_optimizer count steps in their groups, and warm-ups of scripts for them
    read it there. Where a state_dict lacks it, it is the most steps that a parameter has taken.
    """
    if group.get("step") is None:
        states = [state[p] for p in group["params"] if p in state]
        taken = [float(s["step"]) for s in states if s.get("step") is not None]
        group["step"] = max(taken, default=0)
    group["step"] = int(at_least_zero("step", group["step"]))


def count_step(group: Group, state: Any, host_knows: bool) -> None:
    """Count a step, or show a parameter's own counter where the device alone knows it."""
    step = group.get("step")
    if host_knows and step is not None and not isinstance(step, Tensor):
        group["step"] = int(step) + 1
    elif step is None:  # groups were replaced by hand: the states have counted this step
        show_steps(group, state)
    else:
        counters = (state[p].get("step") for p in group["params"] if p in state)
        group["step"] = next((c for c in counters if c is not None), step)
