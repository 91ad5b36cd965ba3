"""From a library's states to those of fastlars, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlars.migrate.formats import Format
from fastlars.optim.meaning import DECAY_OPTIONS, STATE_OPTIONS

States = dict[str, Any]  # of one parameter, by fastlars' names


def from_dict(
    form: Format, name: str, state: Any, _: Any, convert: Any, lr: float | None
) -> list[States]:
    """The states in a state_dict of torch's shape, in the other optimizer's order."""
    if convert is not None:
        raise TypeError(f"convert is for trees of arrays, and a {name} state is a state_dict")
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        raise TypeError(f"a {name} state is a state_dict(), with 'state' and 'param_groups'")
    found = []
    for number, group in enumerate(state["param_groups"]):
        missing = sorted(form.keys - group.keys())
        if missing:
            raise ValueError(f"this state_dict is not of {name}: group {number} has no {missing}")
        for option, value in form.demands.items():
            if group.get(option, value) != value:
                raise ValueError(f"group {number}: {name} states with {option} mean something else")
        shared: States = {"last_lr": group["lr"] if lr is None else lr}
        shared |= {key: group[key] for key in (*STATE_OPTIONS, *DECAY_OPTIONS) if key in group}
        shared |= {ours: group[its] for ours, its in form.options.items() if its in group}
        if form.step == "group":
            shared["step"] = group.get("step")
        for index in group["params"]:
            found.append(_of_parameter(form, name, index, state["state"].get(index), shared))
    return found


def _of_parameter(form: Format, name: str, index: Any, state: Any, shared: States) -> States:
    theirs: States = {}
    for key, value in (state or {}).items():
        # bitsandbytes keeps some tensors in a nested dict, where FSDP does not find them.
        theirs |= value if isinstance(value, Mapping) else {key: value}
    theirs = {key: value for key, value in theirs.items() if value is not None}
    if not theirs:
        return {}
    bad = [key for key in form.refused if key in theirs]
    missing = [key for key in form.names if key not in theirs]
    if bad:
        raise ValueError(
            f"the {name} state of parameter {index} has {bad[0]}, which has no counterpart here"
        )
    if missing:
        raise ValueError(f"the {name} state of parameter {index} has no {missing[0]}")
    ours = {mine: theirs[key] for key, mine in form.names.items()}
    return shared | ours | ({"step": theirs.get("step")} if form.step == "state" else {})


def from_tree(
    form: Format,
    name: str,
    state: Any,
    names: list[str | None],
    convert: Callable[[Any], Any] | None,
    lr: float | None,
) -> list[States]:
    """The states in trees of arrays, in the order of ``names``."""
    # optax nests the states of a chain in tuples; the one with these fields is taken.
    optax = name.startswith("optax")
    trees = _find(state, tuple(form.names)) if optax else {"momentum": state}
    found: list[States] = [{} if lr is None else {"last_lr": lr} for _ in names]
    for theirs, mine in form.names.items():
        if theirs == "count":
            values: Sequence[Any] = [float(trees[theirs])] * len(names)
        else:
            values = _listed(convert(trees[theirs]) if convert else trees[theirs], name, names)
        for states, value in zip(found, values, strict=True):
            states[mine] = value if theirs == "count" else form.sign * _tensor(value)
    return found


def _find(state: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    found, left = [], [state]
    while left:
        node = left.pop()
        if set(fields) <= set(getattr(node, "_fields", ())):
            found.append(node)
        elif isinstance(node, (tuple, list)):
            left += node
    if len(found) != 1:
        raise ValueError(f"the optax state has {len(found)} parts with {', '.join(fields)}, not 1")
    return {each: getattr(found[0], each) for each in fields}


def _listed(tree: Any, name: str, names: list[str | None]) -> Sequence[Any]:
    if isinstance(tree, Mapping):
        if set(tree) != set(names):
            raise ValueError(
                f"{name}: a dict of states needs the names of the parameters, and no others; these "
                f"differ: {sorted(map(str, set(tree) ^ set(names)))}. Pass named params, or convert"
            )
        return [tree[each] for each in names]
    if not isinstance(tree, (list, tuple)) or len(tree) != len(names):
        raise ValueError(f"{name}: states must be a dict or a list of {len(names)}: pass convert")
    return tree


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    import numpy  # what brings such arrays brings it too

    return torch.tensor(numpy.asarray(value), device="cpu")
