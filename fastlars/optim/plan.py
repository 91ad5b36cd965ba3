"""Plan: a parameter group cut into lists that one call of one back end can step.

Everything that costs time is done when the plan is made: the checks, with their messages, and the
states. A step then only gathers its tensors; the back end holds them against the layout,
and a plan that no longer fits is made anew.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor

import fastlars._C as _C
from fastlars.backends.base import Backend, Dtypes, Mismatch, Tensors
from fastlars.backends.choose import ChoiceCache
from fastlars.optim.checks import (
    check_counter,
    check_gradient,
    check_parameter,
    check_rounding,
    check_state,
)
from fastlars.optim.known import Kind, Known, Row
from fastlars.optim.sharded import (
    Shards,
    arrived,
    empty_like,
    local,
    path_to,
    shard,
    sharded_over,
    shards,
    tables,
    unwrapped,
)
from fastlars.optim.wrapped import Path, is_plain
from fastlars.rules import Rule, real

State = dict[Tensor, dict[str, Any]]
LOW_PRECISION = (torch.float16, torch.bfloat16)
# States that say how the last step left a weight or its buffer.
FOLLOWERS = frozenset({"master", "last_lr"})


def location(group: int, index: int, name: str | None = None) -> str:
    """How messages call a parameter."""
    return f"group {group}, parameter {index}" + (f" ({name})" if name else "")


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


def like(weight: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` with the device and the strides of ``weight``; DTensors are sharded alike."""
    # empty_like keeps the strides of a weight without gaps, which is all that a kernel pairs by.
    out = empty_like(weight, dtype)
    shard(out).copy_(shard(value))
    return out


def wanted(weight: Tensor, rule: Rule, group: dict[str, Any]) -> dict[str, torch.dtype]:
    """Names and types of the states of ``weight`` that are shaped like it."""
    names = dict.fromkeys(rule.states, state_dtype(weight, group))
    if has_master(weight, group):
        names["master"] = torch.float32
    return names


def lacks_states(group: dict[str, Any], rule: Rule, state: State) -> bool:
    """Whether the next step of a group has states to make."""
    counter = () if rule.counter is None else (rule.counter,)
    return any(
        state.get(p, {}).get(name) is None
        for p in group["params"]
        if p.grad is not None
        for name in (*wanted(p, rule, group), *counter)
    )


def forget(weight: Tensor, rule: Rule, group: dict[str, Any], states: dict[str, Any]) -> None:
    """Drop those states of ``weight`` that a step makes wrong, because it does without them."""
    for name in FOLLOWERS - {*wanted(weight, rule, group), rule.counter}:
        states.pop(name, None)


def bind(backend: Backend, tensors: Tensors, layout: Any, copied: list[int] | None = None) -> Any:
    """Bound tensors; gradients that do not lie as their weights do are copied.

    ``copied`` remembers which, so that the next step does not need to be refused to find them.
    """
    if copied:
        _copy(tensors, copied)
    try:
        return backend.bind(tensors, layout)
    except Mismatch as mismatch:
        if mismatch.args[0] != "grads" or mismatch.args[2] not in ("strides", "memory"):
            raise
    # Such as a contiguous gradient of a channels_last weight; or zeros that autograd has not
    # written anywhere, as behind torch.sgn.
    found = _copy(tensors, range(len(tensors.grads)))
    if copied is not None:
        copied += found
    return backend.bind(tensors, layout)


def _copy(tensors: Tensors, indices: Iterable[int]) -> list[int]:
    """Copy those gradients of ``indices`` that lie otherwise than their weights; their places."""
    weights, grads = tensors.copies or tensors.weights, list(tensors.grads)
    moved = [i for i in indices if _lies_otherwise(weights[i], grads[i])]
    given = [grads[i] for i in moved]
    for i in moved:
        grads[i] = torch.empty_like(weights[i], dtype=grads[i].dtype, requires_grad=False)
    if moved:
        torch._foreach_copy_([grads[i] for i in moved], given)
    tensors.grads = grads
    return moved


def _lies_otherwise(weight: Tensor, grad: Tensor) -> bool:
    if grad.layout != torch.strided:
        return False  # the checks say what is wrong with it
    return grad.stride() != weight.stride() or grad._is_zerotensor()


@dataclass
class Sublist:
    """Parameters of a group that agree in device, types, back end, mesh and where they lie."""

    indices: list[int]
    weights: list[Tensor]
    dtypes: Dtypes
    backend: Backend
    layout: Any
    single: list[int]  # weights of one element
    states: list[dict[str, Any]]
    path: Path = ()  # from the weights to their plain tensors
    shards: Shards | None = None  # of weights of which other ranks hold other shards
    wrapped_grads: bool = False  # some gradients may be of a tensor subclass
    copied: list[int] = field(default_factory=list)  # whose gradients lie otherwise


def options_of(group: dict[str, Any], rule: Rule) -> tuple[Any, ...]:
    """What decides states and their types, and what is refused."""
    names = ("master_weights", "state_dtype", "capturable", "stochastic_rounding")
    return (rule.states, rule.counter, *map(group.__getitem__, names))


class Plan:
    """The sublists of one group, for one set of parameters with gradients.

    Making it checks everything and writes nothing; :meth:`ready` makes states.
    """

    def __init__(
        self,
        group: dict[str, Any],
        number: int,
        rule: Rule,
        state: State,
        known: Known | None = None,
    ) -> None:
        self.params: list[Tensor] = list(group["params"])
        grads = [p.grad for p in self.params]
        self.grad_types = list(map(type, grads))
        self.rule = rule
        self.state = state
        self.group = group
        self.options = options_of(group, rule)
        names = group.get("param_names") or []
        # A list that was changed by hand does not say whose names are left.
        self.names = names if len(names) == len(grads) else [None] * len(grads)
        self.number = number
        self.places = list(range(len(grads)))
        self.known = known
        self.dtypes = self._sort(grads)
        self.sublists: list[Sublist] = []
        self.whole = False

    def ready(self, keeps: bool = True) -> Plan:
        """Make the states that are missing, and the layouts; what was checked cannot fail now.

        ``keeps`` what is known for the plans of other gradients.
        """
        for indices in self.dtypes.values():
            for i in indices:
                self._make_states(self.params[i], self.group)
        rows = {
            i: Row(self.grad_types[i], kind, self.state[p], shards([p], kind.path)[0].numel() == 1)
            for kind, indices in self.dtypes.items()
            for i, p in ((i, self.params[i]) for i in indices)
        }
        self.sublists = self._cut(rows)
        self.known = Known(self.params, rows, self.known) if keeps else None
        return self

    def of_others(self, params: list[Tensor], grads: list[Any]) -> Plan | None:
        """The plan, ready, for gradients of other parameters of the group, if all were checked."""
        known, types = self.known, list(map(type, grads))
        if known is None or not known.is_of(params):
            return None
        kept = known.plans.pop(tuple(types), None)
        plan = self._sorted_anew(known, types) if kept is None else kept
        if plan is not None:
            known.keep(tuple(types), plan)
        return plan

    def _sorted_anew(self, known: Known, types: list[type]) -> Plan | None:
        dtypes: dict[int, tuple[Kind, list[int]]] = {}
        rows, last = known.rows, None
        indices: list[int] = []
        for i, grad_type in enumerate(types):
            if grad_type is NoneType:
                continue
            row = rows.get(i)
            if row is None or row[0] is not grad_type:
                return None
            if row[1] is not last:
                last, indices = dtypes.setdefault(id(row.kind), (row.kind, []))
            indices.append(i)
        if not known.lie_as_before():
            return None
        plan = copy.copy(self)
        plan.grad_types, plan.dtypes = types, dict(dtypes.values())
        plan.sublists = plan._cut(known.rows)
        return plan

    def part(self, indices: list[int], grads: list[Tensor]) -> Plan:
        """The plan of some of these parameters, ready, with gradients that lie elsewhere."""
        plan = copy.copy(self)
        plan.params = [self.params[i] for i in indices]
        plan.places = [self.places[i] for i in indices]
        plan.grad_types = list(map(type, grads))
        plan.known = None
        plan.dtypes = plan._sort(list(grads))
        return plan.ready(keeps=False)

    def gradients(self, params: list[Tensor]) -> list[Any] | None:
        """Of the parameters, if these and the types of their gradients are what the plan was made
        for."""
        return _C.gradients(list(params), self.params, self.grad_types)

    def _place(self, i: int) -> str:
        index = self.places[i]
        return location(self.number, index, self.names[index])

    def _check(self, place: str, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        check_parameter(p, place)
        check_gradient(p, g, place)
        if group["stochastic_rounding"]:
            check_rounding(p, place)
        states = self.state.get(p, {})
        for name, dtype in wanted(p, self.rule, group).items():
            if states.get(name) is not None:
                check_state(p, name, states[name], dtype, place)
        counter = self.rule.counter
        begun = any(states.get(name) is not None for name in self.rule.states)
        if counter in states and (begun or states[counter] is not None):
            check_counter(counter, states[counter], place)

    def _make_states(self, p: Tensor, group: dict[str, Any]) -> None:
        states = self.state.setdefault(p, {})
        forget(p, self.rule, group, states)
        # None is how torch's SGD writes a momentum that was reset.
        fresh = [name for name in self.rule.states if states.get(name) is None]
        for name, dtype in wanted(p, self.rule, group).items():
            value = states.get(name)
            if value is None:
                # A zero of the host's would be spread out there, and sent in full.
                zero = torch.zeros((), dtype=dtype, device=p.device)
                start = p.detach() if name == "master" else zero
                states[name] = like(p, start, dtype)
            elif not is_plain(local(value)) or shard(value).stride() != shard(p).stride():
                states[name] = like(p, value, dtype)
        counter = self.rule.counter
        if counter is not None:
            dtype, count = counter_dtype(p), states.get(counter)
            if len(fresh) == len(self.rule.states):
                count = self.rule.NEVER_STEPPED
            elif count is None:
                count = 0.0  # as rate of a step that nobody noted, it corrects nothing
            # A 0-dim tensor, as in torch.optim: it survives checkpoints, and a device can
            # advance it by itself.
            if not (isinstance(count, Tensor) and count.dim() == 0 and count.dtype == dtype):
                count = torch.full((), real(counter, count), dtype=dtype, device=p.device)
            states[counter] = count.to(p.device)

    def _sort(self, grads: list[Tensor | None]) -> dict[Kind, list[int]]:
        """Parameters with gradients, checked, by what one call of a back end needs alike."""
        group = self.group
        by_kind: dict[Kind, list[int]] = defaultdict(list)
        choose = ChoiceCache(self.rule, group["stochastic_rounding"])
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            place = self._place(i)
            self._check(place, p, g, group)
            dtypes = Dtypes(p.dtype, g.dtype, state_dtype(p, group))
            if has_master(p, group):
                dtypes = Dtypes(torch.float32, g.dtype, state_dtype(p, group), copy=p.dtype)
            path = path_to(p)
            try:
                backend = choose(shards([p], path)[0], dtypes)
            except RuntimeError as error:
                raise RuntimeError(f"{place}: {error}") from None
            if group["capturable"] and not backend.reads_device:
                raise RuntimeError(
                    f"{place}: capturable=True needs a back end that reads lr and step on the "
                    f"device, but {backend.name} serves it"
                )
            by_kind[Kind(p.device, dtypes, backend, path, sharded_over(p))].append(i)
        return by_kind

    def _cut(self, rows: Mapping[int, Row]) -> list[Sublist]:
        sublists = []
        found = tables([(kind.over, indices) for kind, indices in self.dtypes.items()])
        for (kind, indices), place in zip(self.dtypes.items(), found, strict=True):
            weights = [self.params[i] for i in indices]
            plain = shards(weights, kind.path)
            layout = kind.backend.layout(plain)
            chosen = [rows[i] for i in indices]
            single = [n for n, row in enumerate(chosen) if row.single]
            states = [row.states for row in chosen]
            sharded = None
            if place is not None:
                table, places = place
                sharded = Shards(table, places.to(kind.device))
            lists = (indices, weights, kind.dtypes, kind.backend, layout, single, states)
            wrapped = any(self.grad_types[i] is not Tensor for i in indices)
            sublists.append(Sublist(*lists, kind.path, sharded, wrapped))
        self.whole = [s.indices for s in sublists] == [list(range(len(self.params)))]
        return sublists

    def gather(self, sublist: Sublist, grads: list[Any]) -> Tensors:
        """The tensors of this step. KeyError where a state is gone."""
        if not self.whole:
            grads = [grads[i] for i in sublist.indices]
        states = sublist.states
        counter = self.rule.counter
        weights, copies = sublist.weights, None
        if sublist.dtypes.copy is not None:
            weights, copies = _C.column(states, "master"), weights
        tensors = Tensors(
            weights=weights,
            grads=grads,
            states=tuple(_C.column(states, name) for name in self.rule.states),
            counters=_C.column(states, counter) if counter is not None else None,
            copies=copies,
            dtypes=sublist.dtypes,
        )
        if sublist.path:
            return unwrapped(tensors, sublist.path)
        if sublist.wrapped_grads:
            tensors.grads = arrived(tensors.grads)
        return tensors

    def bind(self, grads: list[Any]) -> list[tuple[Sublist, Any]]:
        """Every sublist's tensors, checked by its back end; nothing is written.

        Raises:
            Mismatch: the plan no longer fits what it was made for.
            KeyError: a state is gone.
        """
        bound = []
        for sublist in self.sublists:
            tensors = self.gather(sublist, grads)
            for i in sublist.single:
                # A lazy negation lies behind strides of 2, which no layout accepts, but for
                # tensors of one element.
                if tensors.grads[i].is_neg():
                    tensors.grads = [g.resolve_neg() for g in tensors.grads]
            bound.append((sublist, bind(sublist.backend, tensors, sublist.layout, sublist.copied)))
        return bound
