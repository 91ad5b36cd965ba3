"""The step as torch.compile traces it: gather tensors, then call one operator for each group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlars.optim.checks import checked_rule, errors_at
from fastlars.optim.compile import operator
from fastlars.optim.norm import check_norm
from fastlars.optim.plan import GroupPlan
from fastlars.optim.states import drop_stale_states
from fastlars.optim.stepper import Stepper
from fastlars.optim.values import BUILTIN, consists_of
from fastlars.rules import Rule

Lists: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class TracedStep:
    """The part of ``FusedOptimizer`` that runs inside a compiled region."""

    param_groups: list[dict[str, Any]]
    state: Any
    defaults: dict[str, Any]
    stepper: Stepper
    overlap_hook: Any
    _step_outside_graph: Any

    rule_of: Callable[[dict[str, Any]], Rule]

    def _init_group(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        counters: list[Tensor],
        masters: list[Tensor],
    ) -> tuple[str, tuple[tuple[str, Any], ...] | None]:
        """Fill the lists; return the rule as text, and the group's options that are numbers.

        Returns None instead of the numbers if an option has a type that torch.compile does not
        guard. ``states`` gets all states of the first parameter, then those of the second, and so
        on.

        torch.compile knows this method by its name: it runs the method instead of tracing it,
        guards the values that it has read, and makes the tensors in the lists inputs of its graph.
        """
        if needs := self.stepper.needs_norm(self.param_groups):
            check_norm(needs, self.stepper.owner, None)
        rules = []
        for number, other in enumerate(self.param_groups):
            with errors_at(f"group {number}"):
                rules.append(checked_rule(self.rule_of, other))
        # In all groups at the first call: torch.compile guards the states as the first call leaves
        # them, and so a later call must not remove any.
        for other, rule in zip(self.param_groups, rules, strict=True):
            for p in other["params"]:
                if p.grad is not None and p in self.state:
                    drop_stale_states(p, rule, other, self.state[p])
        # All groups are checked before the first state is made.
        plans = [
            GroupPlan(other, number, rule, self.state)
            for number, (other, rule) in enumerate(zip(self.param_groups, rules, strict=True))
        ]
        plan = next(plan for plan in plans if plan.group is group)
        number, rule = plan.number, plan.rule
        for batch in plan.prepare(caches=False).batches:
            if batch.path:
                raise RuntimeError(
                    f"group {number}: DTensors are not stepped inside torch.compile, nor are other "
                    "subclasses: leave optimizer.step() out of the compiled region"
                )
            params = [group["params"][i] for i in batch.indices]
            of_params = [self.state[p] for p in params]
            weights += params
            grads += [p.grad for p in params]
            states += [s[name] for s in of_params for name in rule.states]
            if rule.counter is not None:
                counters += [s[rule.counter] for s in of_params]
            if batch.dtypes.copy is not None:
                masters += [s["master"] for s in of_params]
        options = {name: group[name] for name in self.defaults}
        if isinstance(options["lr"], Tensor):
            del options["lr"]  # an input of the graph, and no constant in it
        if not all(consists_of(value, BUILTIN) for value in options.values()):
            return operator.encode(rule), None
        numbers = {k: v for k, v in options.items() if k != "lr" and consists_of(v, (int, float))}
        return operator.encode(rule), tuple(numbers.items())

    def _traceable(self) -> bool:
        return (
            self.overlap_hook is None
            and self.stepper.norm_group is None
            and self.stepper.skip_if is None
            and getattr(self, "found_inf", None) is None
        )

    def _step_traced(self) -> None:
        gathered = []
        norm = None
        for group in self.param_groups:
            # Weights, gradients, states, counters and masters.
            lists: Lists = ([], [], [], [], [])
            rule, numbers = self._init_group(group, *lists)
            # Once a float has changed, torch.compile no longer guards its value, and the rule in
            # the graph would keep the old number. A comparison with a constant makes it guard the
            # value, and trace again.
            if numbers is None or any(group[name] != value for name, value in numbers):
                self._step_outside_graph()
                return
            if len(lists[0]) > 0:
                gathered.append((group, rule, lists))
        if any(group["max_grad_norm"] is not None for group, *_ in gathered):
            norm = torch.ops.fastlars.square_norm(
                [w for *_, lists in gathered for w in lists[0]],
                [g for *_, lists in gathered for g in lists[1]],
                [len(lists[1]) for *_, lists in gathered],
            )
        for group, rule, lists in gathered:
            lr = group["lr"]
            is_tensor = isinstance(lr, Tensor)
            torch.ops.fastlars.step(
                rule,
                *lists,
                None if is_tensor else lr,
                lr if is_tensor else None,
                -1.0 if group["maximize"] else 1.0,
                norm,
                group["max_grad_norm"],
                group["stochastic_rounding"],
            )
