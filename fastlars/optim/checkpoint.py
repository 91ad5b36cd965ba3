"""Loading optimizer states: their types, their layouts, and states of torch's own optimizers.

torch casts every state to the type of its parameter, keeps whatever strides the checkpoint had, and
loads shapes that do not fit without a word. Here a state keeps its own type, takes its parameter's
strides, and a dict that does not fit is refused before anything is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastlars.optim.checks import check_counter, checked_rule, location
from fastlars.optim.dtensor import is_dtensor, mesh_of, redistribute_like
from fastlars.optim.meaning import why_not_the_same
from fastlars.optim.shown import show_steps
from fastlars.optim.states import (
    DROPPED_IF_UNUSED,
    copy_with_layout,
    counter_dtype,
    state_dtype,
    state_dtypes,
)
from fastlars.rules import Rule, at_least_zero, real

if TYPE_CHECKING:
    from fastlars.optim.base import FusedOptimizer

Dict = dict[str, Any]


@dataclass(frozen=True)
class ForeignOptimizer:
    """A torch optimizer whose state may be loaded.

    Attributes:
        keys: what its parameter groups have, and those of no relative of it.
        states: the names of its states that are taken over, which mean the same here.
        refused: states that have no counterpart.
        incompatibility: why a group of the loading optimizer cannot take the states exactly; empty
            where it can.
    """

    keys: frozenset[str]
    states: tuple[str, ...]
    refused: tuple[str, ...]
    incompatibility: Callable[[Dict], str] = lambda _: ""

    def matches(self, group: Dict) -> bool:
        return self.keys <= group.keys()


def portable(_: Any, state_dict: Dict) -> Dict:
    """``state_dict`` with types by their names: torch.distributed.checkpoint gathers no others."""
    groups = [{**g, "state_dtype": str(g["state_dtype"])} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def take_types(group: Dict) -> bool:
    """Put types in the place of their names, in a group; whether there was one."""
    name = group.get("state_dtype")
    if not (isinstance(name, str) and name.startswith("torch.")):
        return False
    group["state_dtype"] = getattr(torch, name.removeprefix("torch."), name)
    return True


def load(optimizer: FusedOptimizer, load_base: Callable[[Dict], None], state_dict: Dict) -> None:
    """Load through ``load_base``, torch's method, and mend what it does to the states."""
    loaded: Dict = {}
    states: dict[Tensor, Dict] = {}

    def check(_: Any, incoming: Dict) -> Dict:
        loaded.update(_translated(optimizer, incoming))
        loaded["param_groups"] = [dict(group) for group in loaded["param_groups"]]
        for ours, theirs in zip(optimizer.param_groups, loaded["param_groups"], strict=False):
            # What a hook left out, and what a version before did not have, stays as it is.
            for name in optimizer.defaults.keys() & ours.keys() - theirs.keys():
                theirs[name] = ours[name]
            take_types(theirs)
        if _fits(optimizer, loaded):
            states.update(
                {p: _state_of(optimizer, p, *of) for p, *of in _members(optimizer, loaded)}
            )
        # torch's own copies would share memory with the checkpoint, and make generators of texts.
        indices = {index for group in loaded["param_groups"] for index in group["params"]}
        rest = {k: {} if k in indices else _copied(v) for k, v in loaded["state"].items()}
        return {**loaded, "state": rest}

    def mend(_: Any) -> None:
        optimizer.state.update(states)
        for ours, theirs in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
            if optimizer.counts_steps and "step" not in theirs:
                del ours["step"]  # which was taken from states that were not there yet
                show_steps(ours, optimizer.state)

    # The user's own hooks come first before loading and last after it, and so see what counts.
    before = optimizer.register_load_state_dict_pre_hook(check)
    after = optimizer.register_load_state_dict_post_hook(mend, prepend=True)
    try:
        load_base(state_dict)
    finally:
        before.remove()
        after.remove()


def _members(optimizer: FusedOptimizer, loaded: Dict) -> Iterator[tuple[Tensor, Dict, Dict]]:
    """Parameters with a state in the dict, their loaded group, that state."""
    for ours, theirs in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
        for p, index in zip(ours["params"], theirs["params"], strict=True):
            if index in loaded["state"]:
                yield p, {**ours, **theirs}, loaded["state"][index]


def _state_of(optimizer: FusedOptimizer, p: Tensor, group: Dict, state: Dict) -> Dict:
    rule = optimizer.rule_of(group)
    # Also those that the rule does without today, such as the buffer of a momentum of 0.
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
    """A copy of what a wrapper keeps in a state. With a parameter, it is moved and cast as torch
    does it: to the parameter's device and, but for what is called step, to its type."""
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


def _translated(optimizer: FusedOptimizer, incoming: Dict) -> Dict:
    """The dict itself, or what another optimizer's dict comes to with our hyper-parameters."""
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
    translated: Dict = {"state": {}, "param_groups": []}
    for number, (ours, theirs) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        reason = source.incompatibility(ours) or why_not_the_same(ours, theirs)
        if reason:
            raise ValueError(f"group {number}: {reason}")
        kept = {k: v for k, v in ours.items() if k not in ("params", "param_names", "step")}
        translated["param_groups"].append({**kept, "params": theirs["params"]})
        for i, index in enumerate(theirs["params"]):
            state = incoming["state"].get(index, {})
            bad = [name for name in source.refused if state.get(name) is not None]
            if bad:
                raise ValueError(f"{location(number, i)}: {kind} has no use for its {bad[0]}")
            taken = {k: v for k, v in state.items() if k in source.states and v is not None}
            if taken:
                if optimizer.rule_of(ours).counter == "last_lr":
                    taken["last_lr"] = theirs["lr"]
                translated["state"][index] = taken
    return translated


def _fits(optimizer: FusedOptimizer, loaded: Dict) -> bool:
    """Raise where something in the dict does not fit; False where groups have other sizes."""
    sizes = [len(group["params"]) for group in loaded["param_groups"]]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return False  # torch's own check follows, with its own message
    for number, (ours, theirs) in enumerate(
        zip(optimizer.param_groups, loaded["param_groups"], strict=True)
    ):
        group = {**ours, **theirs}
        try:
            rule = checked_rule(optimizer.rule_of, group)
            if optimizer.counts_steps and group.get("step") is not None:
                at_least_zero("step", group["step"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"state_dict, group {number}: {error}") from None
        for i, (p, index) in enumerate(zip(ours["params"], theirs["params"], strict=True)):
            state = loaded["state"].get(index, {})
            if any(name in state for name in rule.states):  # a wrapper may have begun before us
                _check_state(p, state, rule, group, f"state_dict, {location(number, i)}")
    return True


def _check_state(p: Tensor, state: Dict, rule: Rule, group: Dict, where: str) -> None:
    names = list(state_dtypes(p, rule, group))
    for name in [*names, rule.counter] if rule.counter is not None else names:
        value = state.get(name)
        if name not in state and name in DROPPED_IF_UNUSED:
            continue  # its option was switched on after the last step: the next step makes it
        if value is None and name in state and name in rule.states:
            continue  # a state that was reset starts anew, here as in torch's SGD
        if value is None:
            raise ValueError(f"{where}: no {name}")
        if name == rule.counter:
            try:
                check_counter(name, value, where)
            except TypeError as error:
                raise ValueError(f"{error}") from None
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
            raise ValueError(f"{where}: {name} is no tensor of real numbers that fits")
        if is_dtensor(value) and mesh_of(value) != mesh_of(p):
            raise ValueError(
                f"{where}: {name} is a DTensor on {mesh_of(value)}, the parameter on {mesh_of(p)}: "
                "load it through torch.distributed.checkpoint"
            )
        if not is_lazy(p) and value.shape != p.shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
            )
