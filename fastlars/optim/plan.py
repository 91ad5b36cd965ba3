"""GroupPlan: a parameter group cut into batches, each stepped in one call of one back end.

Everything that takes time is done when the plan is made: the checks, with their messages, and the
states. A step then only gathers its tensors. The back end compares them with the layout that the
plan keeps, and a plan that no longer fits is made anew.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends.base import Backend, Dtypes, Tensors
from fastlars.backends.choose import ChoiceCache
from fastlars.optim.checks import (
    check_counter,
    check_gradient,
    check_parameter,
    check_rounding,
    check_state,
    location,
)
from fastlars.optim.dtensor import (
    TableRows,
    at_path,
    path_to_plain,
    plain_tensors,
    sharded_over,
    table_rows,
)
from fastlars.optim.gradients import bind_copying_gradients, plain_gradients
from fastlars.optim.plan_cache import BatchKey, CheckedParameter, PlanCache
from fastlars.optim.states import States, has_master, make_states, state_dtype, state_dtypes
from fastlars.optim.wrapped import Path
from fastlars.rules import Rule


@dataclass
class TensorBatch:
    """Parameters of a group that one call steps: those with the same ``BatchKey``."""

    indices: list[int]  # in the plan's parameters
    weights: list[Tensor]
    dtypes: Dtypes
    backend: Backend
    layout: Any
    one_element: list[int]  # indices, in this batch, of weights of one element
    states: list[dict[str, Any]]
    path: Path = ()  # from the weights to their plain tensors
    rows: TableRows | None = None  # if other ranks hold other shards of the weights
    wrapped_grads: bool = False  # some gradients may be of a tensor subclass
    copied: list[int] = field(default_factory=list)  # gradients laid out unlike the weight


def plan_options(group: dict[str, Any], rule: Rule) -> tuple[Any, ...]:
    """The options that decide states and their types, and which parameters are refused."""
    names = ("master_weights", "state_dtype", "capturable", "stochastic_rounding")
    return (rule.states, rule.counter, *map(group.__getitem__, names))


class GroupPlan:
    """The batches of one group, for one set of parameters with gradients.

    Making a plan checks everything and writes nothing; ``prepare`` then makes the states.
    """

    def __init__(
        self,
        group: dict[str, Any],
        number: int,
        rule: Rule,
        states: States,
        cache: PlanCache | None = None,
        grads: list[Tensor | None] | None = None,
    ) -> None:
        """Args:
        group: the parameter group.
        number: its index, for messages.
        rule: the rule with the options of the group.
        states: the optimizer's ``state``.
        cache: of the group's earlier plans, if their checks still hold.
        grads: a gradient of each parameter, or None for one without; by default ``p.grad``.

        Raises:
            TypeError, ValueError: a parameter, gradient or state cannot be stepped.
            RuntimeError: FASTLARS_BACKEND or ``capturable`` demands what no back end does here.
        """
        self.params: list[Tensor] = list(group["params"])
        if grads is None:
            grads = [p.grad for p in self.params]
        self.grad_types = list(map(type, grads))
        self.rule = rule
        self.states = states
        self.group = group
        self.options = plan_options(group, rule)
        names = group.get("param_names") or []
        # After a list of parameters was changed by hand, names cannot be matched to parameters.
        self.names = names if len(names) == len(grads) else [None] * len(grads)
        self.number = number
        self.group_indices = list(range(len(grads)))
        self.cache = cache
        self.indices_by_key = self._sort_by_key(grads)
        self.batches: list[TensorBatch] = []
        self.is_single_batch = False

    def prepare(self, caches: bool = True) -> GroupPlan:
        """Make missing states, and the batches. This cannot fail after the checks.

        ``caches`` keeps what was checked for steps in which other parameters have gradients.
        """
        for indices in self.indices_by_key.values():
            for i in indices:
                p = self.params[i]
                make_states(p, self.rule, self.group, self.states.setdefault(p, {}))
        checked = {
            i: CheckedParameter(
                self.grad_types[i], key, self.states[p], at_path([p], key.path)[0].numel() == 1
            )
            for key, indices in self.indices_by_key.items()
            for i, p in ((i, self.params[i]) for i in indices)
        }
        self.batches = self._make_batches(checked)
        self.cache = PlanCache(self.params, checked, self.cache) if caches else None
        return self

    def for_other_gradients(self, params: list[Tensor], grads: list[Any]) -> GroupPlan | None:
        """The plan for gradients of other parameters of the group, from the cache; None where some
        of them were not checked yet, or not with gradients of these types."""
        cache, types = self.cache, list(map(type, grads))
        if cache is None or not cache.is_of(params):
            return None
        kept = cache.plans.pop(tuple(types), None)
        plan = self._from_checked(cache, types) if kept is None else kept
        if plan is not None:
            cache.keep(tuple(types), plan)
        return plan

    def _from_checked(self, cache: PlanCache, types: list[type]) -> GroupPlan | None:
        members: dict[int, tuple[BatchKey, list[int]]] = {}
        checked, last = cache.checked, None
        indices: list[int] = []
        for i, grad_type in enumerate(types):
            if grad_type is NoneType:
                continue
            known = checked.get(i)
            if known is None or known.grad_type is not grad_type:
                return None
            if known.key is not last:
                last, indices = members.setdefault(id(known.key), (known.key, []))
            indices.append(i)
        if not cache.layout_is_unchanged():
            return None
        plan = copy.copy(self)
        plan.grad_types, plan.indices_by_key = types, dict(members.values())
        plan.batches = plan._make_batches(cache.checked)
        return plan

    def subset(self, indices: list[int], grads: list[Tensor]) -> GroupPlan:
        """A prepared plan for some of these parameters, with gradients other than ``p.grad``."""
        plan = copy.copy(self)
        plan.params = [self.params[i] for i in indices]
        plan.group_indices = [self.group_indices[i] for i in indices]
        plan.names = [self.names[i] for i in indices]
        plan.grad_types = list(map(type, grads))
        plan.cache = None
        plan.indices_by_key = plan._sort_by_key(list(grads))
        return plan.prepare(caches=False)

    def gradients(self, params: list[Tensor]) -> list[Any] | None:
        """The gradients of ``params``, if these are the plan's parameters, and their gradients have
        the types that the plan was made for; else None."""
        return _C.gradients(list(params), self.params, self.grad_types)

    def _check(self, place: str, p: Tensor, g: Tensor) -> None:
        group = self.group
        check_parameter(p, place)
        check_gradient(p, g, place)
        if group["stochastic_rounding"]:
            check_rounding(p, place)
        states = self.states.get(p, {})
        for name, dtype in state_dtypes(p, self.rule, group).items():
            if states.get(name) is not None:
                check_state(p, name, states[name], dtype, place)
        counter = self.rule.counter
        begun = any(states.get(name) is not None for name in self.rule.states)
        if counter in states and (begun or states[counter] is not None):
            check_counter(counter, states[counter], place)

    def _sort_by_key(self, grads: list[Tensor | None]) -> dict[BatchKey, list[int]]:
        """Check the parameters with gradients, and sort their indices into batches."""
        group = self.group
        members: dict[BatchKey, list[int]] = defaultdict(list)
        choose = ChoiceCache(self.rule, group["stochastic_rounding"])
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            place = location(self.number, self.group_indices[i], self.names[i])
            self._check(place, p, g)
            dtypes = Dtypes(p.dtype, g.dtype, state_dtype(p, group))
            if has_master(p, group):
                dtypes = Dtypes(torch.float32, g.dtype, state_dtype(p, group), copy=p.dtype)
            path = path_to_plain(p)
            try:
                backend = choose(at_path([p], path)[0], dtypes)
            except RuntimeError as error:
                raise RuntimeError(f"{place}: {error}") from None
            if group["capturable"] and not backend.reads_device:
                raise RuntimeError(
                    f"{place}: capturable=True needs a back end that reads lr and step on the "
                    f"device, but {backend.name} serves it"
                )
            members[BatchKey(p.device, dtypes, backend, path, sharded_over(p))].append(i)
        return members

    def _make_batches(self, checked: Mapping[int, CheckedParameter]) -> list[TensorBatch]:
        batches = []
        members = self.indices_by_key.items()
        every_rows = table_rows([(key.mesh_dims, key.device, indices) for key, indices in members])
        for (key, indices), rows in zip(members, every_rows, strict=True):
            weights = [self.params[i] for i in indices]
            chosen = [checked[i] for i in indices]
            batches.append(
                TensorBatch(
                    indices=indices,
                    weights=weights,
                    dtypes=key.dtypes,
                    backend=key.backend,
                    layout=key.backend.layout(at_path(weights, key.path)),
                    one_element=[n for n, each in enumerate(chosen) if each.has_one_element],
                    states=[each.states for each in chosen],
                    path=key.path,
                    rows=rows,
                    wrapped_grads=any(self.grad_types[i] is not Tensor for i in indices),
                )
            )
        self.is_single_batch = [b.indices for b in batches] == [list(range(len(self.params)))]
        return batches

    def gather(self, batch: TensorBatch, grads: list[Any]) -> Tensors:
        """The tensors of a batch in this step. KeyError where a state is gone."""
        if not self.is_single_batch:
            grads = [grads[i] for i in batch.indices]
        states = batch.states
        counter = self.rule.counter
        weights, copies = batch.weights, None
        if batch.dtypes.copy is not None:
            weights, copies = _C.column(states, "master"), weights
        tensors = Tensors(
            weights=weights,
            grads=grads,
            states=tuple(_C.column(states, name) for name in self.rule.states),
            counters=_C.column(states, counter) if counter is not None else None,
            copies=copies,
            dtypes=batch.dtypes,
        )
        if batch.path:
            return plain_tensors(tensors, batch.path)
        if batch.wrapped_grads:
            tensors.grads = plain_gradients(tensors.grads)
        return tensors

    def bind_batches(self, grads: list[Any]) -> list[tuple[TensorBatch, Any]]:
        """Every batch with what its back end bound: checked tensors. Nothing is written.

        Raises:
            Mismatch: a tensor does not have the layout with which the plan was made.
            KeyError: a state is gone.
        """
        bound = []
        for batch in self.batches:
            tensors = self.gather(batch, grads)
            for i in batch.one_element:
                # A lazy negation comes with strides that no layout accepts, except on tensors of
                # one element, whose strides do not matter: resolve it here.
                if tensors.grads[i].is_neg():
                    tensors.grads = [g.resolve_neg() for g in tensors.grads]
            copied = batch.copied
            bound.append(
                (batch, bind_copying_gradients(batch.backend, tensors, batch.layout, copied))
            )
        return bound
