"""Planner: turns parameter groups into bound batches, which a step then runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from fastlars import _C
from fastlars.backends.base import Mismatch
from fastlars.optim.checks import check_lr, check_shared_memory, checked_rule, location
from fastlars.optim.execute import BoundBatch, check_states_exist
from fastlars.optim.options import names_to_dtypes
from fastlars.optim.plan import GroupPlan, plan_options
from fastlars.optim.plan_cache import BatchKey
from fastlars.optim.states import States
from fastlars.optim.values import comparable_copy, same_objects, unchanged
from fastlars.rules import Rule

Group: TypeAlias = dict[str, Any]


@dataclass
class GroupSlice:
    """Some parameters of one group, with gradients to use instead of ``p.grad``, such as views of a
    bucket of DDP."""

    number: int  # of the group
    indices: list[int]  # in the group's parameters
    grads: list[Tensor]
    plan: GroupPlan | None = None
    group_plan: GroupPlan | None = None  # that ``plan`` was made from

    def reuse_plan_of(self, other: GroupSlice | None) -> None:
        """Take over the plan that an earlier step made for the same parameters."""
        if other is not None and other.indices == self.indices:
            self.group_plan, self.plan = other.group_plan, other.plan


def slices_of(groups: list[Group], grads: dict[Tensor, Tensor]) -> list[GroupSlice]:
    """A slice of each group that has parameters with one of these gradients."""
    slices = []
    for number, group in enumerate(groups):
        indices = [i for i, p in enumerate(group["params"]) if p in grads]
        if indices:
            own = [grads[group["params"][i]] for i in indices]
            slices.append(GroupSlice(number, indices, own))
    return slices


def located_parameters(groups: list[Group]) -> list[tuple[Tensor, str]]:
    """All parameters of the groups, with what messages call each."""
    return [
        (p, location(number, i))
        for number, group in enumerate(groups)
        for i, p in enumerate(group["params"])
    ]


class Planner:
    """Plans the groups of one optimizer: which batches to step, checked, with their states.

    A plan is made once, with all checks, and bound at every step to that step's gradients. The
    optimizer's groups and states are arguments of each call, because both may be replaced.
    """

    def __init__(self, rule_of: Callable[[Group], Rule], options: Iterable[str]) -> None:
        """Args:
        rule_of: the rule that a group's options make; a method of the optimizer's class, because a
            method of the optimizer would form a reference cycle with it.
        options: the names of the options of a group: the optimizer's ``defaults``.
        """
        self._rule_of = rule_of
        self._options = options
        self._plans: list[GroupPlan | None] = []
        self._rules: list[tuple[tuple[Any, ...], Rule] | None] = []
        self._planned_states: list[dict[str, Any]] = []

    def bind_groups(self, groups: list[Group], states: States) -> list[BoundBatch]:
        """Every batch of every group, bound to this step's gradients.

        All groups are checked before the first state is made, and bound before anything else is
        written: an error leaves parameters and states as they were.
        """
        self.keep_plans_of(groups, states)
        rules: list[Rule] = []
        bound: list[Any] = []
        new: dict[int, GroupPlan] = {}
        for number, group in enumerate(groups):
            rule = self._rule(number, group)
            rules.append(rule)
            plan = self._plans[number]
            cache = plan.cache if plan is not None else None
            try:
                grads = plan.gradients(group["params"]) if plan is not None else None
                if plan is not None and grads is None:
                    grads = [p.grad for p in group["params"]]
                    plan = plan.for_other_gradients(group["params"], grads)
                    self._plans[number] = plan
                if plan is not None and grads is not None:
                    bound.append(plan.bind_batches(grads))
                    continue
            except (Mismatch, KeyError):
                cache = None  # a parameter or a state was replaced: plan again, with all checks
            # Before the plan is made: what Triton finds out about the device while a CUDA graph is
            # recorded would be wrong, and is cached.
            check_states_exist(group, rule, states)
            new[number] = GroupPlan(group, number, rule, states, cache)
            bound.append(None)
        if new:
            # Lists of parameters, and their memory, may have been changed by hand.
            check_shared_memory(located_parameters(groups))
        for number, plan in new.items():
            self._plans[number] = plan.prepare()
            bound[number] = plan.bind_batches([p.grad for p in plan.params])
        if new:
            self._note_states(states)
        return [
            BoundBatch(group, rule, batch, tensors)
            for group, rule, batches in zip(groups, rules, bound, strict=True)
            for batch, tensors in batches
        ]

    def bind_slice(self, part: GroupSlice, groups: list[Group], states: States) -> list[BoundBatch]:
        """The batches of some parameters of a group, bound to the gradients of the slice.

        Raises:
            Mismatch: a tensor is not as it was when the group was planned.
            KeyError: a state is gone, or the group has no plan.

        After either, ``bind_slices`` plans the group anew.
        """
        group = groups[part.number]
        rule = self._rule(part.number, group)
        group_plan = self._plans[part.number]
        if group_plan is None:
            raise KeyError(part.number)
        if part.plan is None or group_plan is not part.group_plan:
            part.group_plan = group_plan
            part.plan = group_plan.subset(part.indices, part.grads)
            self._note_states(states)  # the slice may have made some
        bound = part.plan.bind_batches(part.grads)
        return [BoundBatch(group, rule, batch, tensors) for batch, tensors in bound]

    def bind_slices(
        self, slices: list[GroupSlice], groups: list[Group], states: States
    ) -> list[BoundBatch]:
        """The batches of all slices. A group whose parameters, states or options have changed is
        planned anew, with all checks of the parameters of its slice."""
        batches = []
        for part in slices:
            try:
                batches += self.bind_slice(part, groups, states)
            except (Mismatch, KeyError):
                self._plans[part.number] = self._plan_of(part, groups, states).prepare()
                self._note_states(states)
                batches += self.bind_slice(part, groups, states)
        return batches

    def check(
        self, groups: list[Group], states: States, grads: dict[Tensor, Tensor]
    ) -> list[tuple[int, BatchKey, list[int]]]:
        """The batches of a step with these gradients: the number of their group, what their
        parameters have in common, and the indices of these. Raises what the step would raise
        before it writes anything."""
        self.keep_up_with(groups, states)
        check_shared_memory(located_parameters(groups))
        return [
            (part.number, key, indices)
            for part in slices_of(groups, grads)
            for key, indices in self._plan_of(part, groups, states).indices_by_key.items()
        ]

    def keep_up_with(self, groups: list[Group], states: States) -> None:
        """Forget plans of parameters or states that were replaced; raise where an option is out of
        range. For code that binds slices without having bound whole groups first."""
        self.keep_plans_of(groups, states)
        for number, group in enumerate(groups):
            self._rule(number, group)
            plan = self._plans[number]
            if plan is not None and not same_objects(plan.params, group["params"]):
                self._plans[number] = None

    def _plan_of(self, part: GroupSlice, groups: list[Group], states: States) -> GroupPlan:
        """A plan of a group in which only the parameters of the slice have gradients."""
        group, grads = groups[part.number], dict(zip(part.indices, part.grads, strict=True))
        every = [grads.get(i) for i in range(len(group["params"]))]
        rule = self._rule(part.number, group)
        return GroupPlan(group, part.number, rule, states, grads=every)

    def current_rules(self, groups: list[Group], states: States) -> list[Rule] | None:
        """The rules of the groups; None where a group's parameters, options or states are not
        those of its plan. TypeError or ValueError where options are out of range."""
        if len(self._plans) != len(groups) or not self.holds(states):
            return None
        rules = [self._rule(number, group) for number, group in enumerate(groups)]
        for plan, group in zip(self._plans, groups, strict=True):
            if not same_objects([] if plan is None else plan.params, group["params"]):
                return None
        return rules

    def holds(self, states: States) -> bool:
        """Whether these are the states that were planned: nobody has cleared ``optimizer.state``,
        or put another dict into it."""
        return _C.holds(states, self._planned_states)

    def keep_plans_of(self, groups: list[Group], states: States) -> None:
        """Forget all plans unless they are of these states, and of as many groups."""
        if len(self._plans) != len(groups) or not self.holds(states):
            self._plans, self._rules = [None] * len(groups), [None] * len(groups)

    def reads_device(self) -> bool:
        """Whether the last step's back ends all read its scalars on the device."""
        batches = [b for plan in self._plans if plan is not None for b in plan.batches]
        return bool(batches) and all(b.backend.reads_device for b in batches)

    def _note_states(self, states: States) -> None:
        self._planned_states = list(states.values())

    def _rule(self, number: int, group: Group) -> Rule:
        """The group's rule, made anew, and so checked, only when an option has changed."""
        try:
            check_lr(group["lr"])
            values = tuple(group[name] for name in self._options if name != "lr")
            known = self._rules[number]
            if known is not None and unchanged(known[0], values):
                return known[1]
            if names_to_dtypes(group):  # ZeroRedundancyOptimizer copies them there
                values = tuple(group[name] for name in self._options if name != "lr")
            rule = checked_rule(self._rule_of, group)
        except (TypeError, ValueError) as error:  # errors_at would cost time in every step
            raise type(error)(f"group {number}: {error}") from None
        self._rules[number] = (comparable_copy(values), rule)
        plan = self._plans[number]
        if plan is not None and plan.options != plan_options(group, rule):
            self._plans[number] = None
        return rule
