"""Loading optimizer states, also those of torch's own optimizers.

torch's load_state_dict casts every state to the type of its parameter, keeps the strides of the
checkpoint, and silently loads mismatched shapes. Here a state keeps its own type and takes the
strides of its parameter, and a state_dict that does not fit is refused before anything is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastlars.optim.checks import check_counter, checked_rule, location
from fastlars.optim.dtensor import is_dtensor, mesh_of, redistribute_like
from fastlars.optim.group_entries import ensure_step_count
from fastlars.optim.meaning import why_states_differ
from fastlars.optim.options import names_to_dtypes
from fastlars.optim.states import (
    DROPPED_IF_UNUSED,
    copy_with_layout,
    counter_dtype,
    state_dtype,
    state_dtypes,
)
from fastlars.ranges import at_least_zero, real
from fastlars.rules import Rule

if TYPE_CHECKING:
    from fastlars.optim.base import FusedOptimizer

Dict = dict[str, Any]


@dataclass(frozen=True)
class ForeignOptimizer:
    """A torch optimizer whose state may be loaded.

    Attributes:
        keys: keys of its parameter groups that together identify it.
        states: names of its states that are loaded; they mean the same here.
        refused: names of its states that have no counterpart.
        incompatibility: returns why a group of the loading optimizer cannot continue from exactly
            these states; empty if it can.
    """

    keys: frozenset[str]
    states: tuple[str, ...]
    refused: tuple[str, ...]
    incompatibility: Callable[[Dict], str] = lambda _: ""

    def matches(self, group: Dict) -> bool:
        return self.keys <= group.keys()


def load(optimizer: FusedOptimizer, load_base: Callable[[Dict], None], state_dict: Dict) -> None:
    """Load the groups by ``load_base``, torch's method, and the states of parameters here."""
    loaded: Dict = {}
    states: dict[Tensor, Dict] = {}

    def prepare(_: Any, incoming: Dict) -> Dict:
        loaded.update(_to_own_format(optimizer, incoming))
        loaded["param_groups"] = [dict(group) for group in loaded["param_groups"]]
        for group, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=False):
            # An option that is not in the dict keeps its value: a hook has removed it, or an
            # earlier version saved the dict.
            for name in optimizer.defaults.keys() & group.keys() - saved.keys():
                saved[name] = group[name]
            names_to_dtypes(saved)
        if _check_loaded(optimizer, loaded):
            for group, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
                for p, index in zip(group["params"], saved["params"], strict=True):
                    if index in loaded["state"]:
                        states[p] = _state_of(optimizer, p, saved, loaded["state"][index])
        # Copied here: torch's own copies would share memory with the checkpoint, and turn strings
        # into generators.
        indices = {index for group in loaded["param_groups"] for index in group["params"]}
        rest = {k: {} if k in indices else _copied(v) for k, v in loaded["state"].items()}
        return {**loaded, "state": rest}

    def install_states(_: Any) -> None:
        optimizer.state.update(states)
        for group, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
            if optimizer.counts_steps and "step" not in saved:
                del group["step"]  # computed by __setstate__, before the states were installed
                ensure_step_count(group, optimizer.state)

    # These hooks run next to the load itself: the user's pre-hooks run before them, and may still
    # edit the dict; the user's post-hooks run after them, and find the states installed.
    before = optimizer.register_load_state_dict_pre_hook(prepare)
    after = optimizer.register_load_state_dict_post_hook(install_states, prepend=True)
    try:
        load_base(state_dict)
    finally:
        before.remove()
        after.remove()


def _state_of(optimizer: FusedOptimizer, p: Tensor, group: Dict, state: Dict) -> Dict:
    rule = optimizer.rule_of(group)
    # STATES includes those that the rule does not use with these options, such as the buffer with a
    # momentum of 0.
    types = dict.fromkeys(rule.STATES, state_dtype(p, group)) | state_dtypes(p, rule, group)
    out: Dict = {}
    for name, value in state.items():
        if name in types and isinstance(value, Tensor) and is_lazy(p):
            out[name] = value.detach().to(p.device, types[name], copy=True)
        elif name in types and isinstance(value, Tensor) and value.shape == p.shape:
            whole = redistribute_like(value, p) if is_dtensor(p) else value
            out[name] = copy_with_layout(p, whole, types[name])
        elif name == rule.counter:
            count = real(name, value)
            out[name] = torch.tensor(count, dtype=counter_dtype(p), device=p.device)
        else:
            out[name] = _copied(value, p, name)
    return out


def _copied(value: Any, p: Tensor | None = None, name: Any = None) -> Any:
    """A copy of a value that a wrapper keeps in a state.

    With a parameter ``p``, tensors are moved to its device and cast to its type, as torch does;
    those named ``step`` are only copied.
    """
    if isinstance(value, Tensor):
        if p is None or name == "step":
            return value.detach().clone()
        dtype = p.dtype if p.is_floating_point() else value.dtype
        return value.detach().to(p.device, dtype, copy=True)
    if isinstance(value, dict):
        return {k: _copied(v, p, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        members = [_copied(v, p) for v in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    return copy.deepcopy(value)


def _to_own_format(optimizer: FusedOptimizer, incoming: Dict) -> Dict:
    """The dict itself if it is of the optimizer's class; the states of another optimizer's dict are
    put into a new one, with the hyper-parameters that the optimizer has."""
    kind = type(optimizer).__name__
    groups = incoming["param_groups"]
    if all(group.keys() & optimizer.own_options for group in groups):
        return incoming
    sources = [s for s in optimizer.loads_from if all(s.matches(group) for group in groups)]
    if not sources:
        raise ValueError(
            f"this state_dict is not of {kind}: its groups have none of "
            f"{sorted(optimizer.own_options)}. "
            "fastlars.migrate.load takes states of other libraries, with the name of their source"
        )
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"this state_dict has {len(groups)} parameter groups, the optimizer "
            f"{len(optimizer.param_groups)}: fastlars.migrate.load takes states parameter by "
            "parameter"
        )
    source = sources[0]
    converted: Dict = {"state": {}, "param_groups": []}
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        reason = source.incompatibility(group) or why_states_differ(group, saved)
        if reason:
            raise ValueError(f"group {number}: {reason}")
        options = {k: v for k, v in group.items() if k not in ("params", "param_names", "step")}
        converted["param_groups"].append({**options, "params": saved["params"]})
        for i, index in enumerate(saved["params"]):
            state = incoming["state"].get(index, {})
            bad = [name for name in source.refused if state.get(name) is not None]
            if bad:
                raise ValueError(f"{location(number, i)}: {kind} has no use for its {bad[0]}")
            loaded = {k: v for k, v in state.items() if k in source.states and v is not None}
            if loaded:
                if optimizer.rule_of(group).counter == "last_lr":
                    loaded["last_lr"] = saved["lr"]
                converted["state"][index] = loaded
    return converted


def _check_loaded(optimizer: FusedOptimizer, loaded: Dict) -> bool:
    """Raise if an option or a state in the dict does not fit. False, without a check, if the sizes
    of the groups differ: torch's method then raises its own error."""
    sizes = [len(group["params"]) for group in loaded["param_groups"]]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return False
    pairs = zip(optimizer.param_groups, loaded["param_groups"], strict=True)
    for number, (group, saved) in enumerate(pairs):
        try:
            rule = checked_rule(optimizer.rule_of, saved)
            if optimizer.counts_steps and saved.get("step") is not None:
                at_least_zero("step", saved["step"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"state_dict, group {number}: {error}") from None
        for i, (p, index) in enumerate(zip(group["params"], saved["params"], strict=True)):
            state = loaded["state"].get(index, {})
            # Before the first step of a parameter, its state may hold a wrapper's entries alone.
            if any(name in state for name in rule.states):
                _check_state(p, state, rule, saved, f"state_dict, {location(number, i)}")
    return True


def _check_state(p: Tensor, state: Dict, rule: Rule, group: Dict, where: str) -> None:
    names = list(state_dtypes(p, rule, group))
    for name in [*names, rule.counter] if rule.counter is not None else names:
        value = state.get(name)
        if name not in state and name in DROPPED_IF_UNUSED:
            continue  # its option was turned on after the last step; the next step makes the state
        if value is None and name in state and name in rule.states:
            continue  # as in torch's SGD, None is a state that was reset; the next step makes it
        if value is None:
            raise ValueError(f"{where}: no {name}")
        if name == rule.counter:
            try:
                check_counter(name, value, where)
            except TypeError as error:
                raise ValueError(f"{error}") from None
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
            raise ValueError(f"{where}: {name} is not a dense tensor of real numbers")
        if is_dtensor(value) and mesh_of(value) != mesh_of(p):
            raise ValueError(
                f"{where}: {name} is a DTensor on {mesh_of(value)}, the parameter on {mesh_of(p)}: "
                "load it through torch.distributed.checkpoint"
            )
        if not is_lazy(p) and value.shape != p.shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
            )
