"""The step as torch.compile traces it: gathering tensors for one operator a group, no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlars.optim.checks import checked_rule, named
from fastlars.optim.compile import operator
from fastlars.optim.norm import check_norm
from fastlars.optim.plan import GroupPlan
from fastlars.optim.states import drop_stale_states
from fastlars.optim.stepper import Stepper
from fastlars.optim.values import is_builtin
from fastlars.rules import Rule


def _is_number(value: Any) -> bool:
    members = value if type(value) in (list, tuple) else (value,)
    return all(type(member) in (int, float) for member in members)


class TracedStep:
    """What :class:`FusedOptimizer` does inside a compiled region."""

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
        """Fill the lists; return the rule as text, and the numbers of the group that are in it, or
        None where they are of types that torch.compile does not guard. States are in one list,
        parameter by parameter.

        The name is torch.compile's: it runs this method instead of tracing it, guards what it read,
        and takes the tensors in the lists for inputs of its graph.
        """
        if needs := self.stepper.needs_norm(self.param_groups):
            check_norm(needs, self.stepper.owner, None)
        rules = []
        for number, other in enumerate(self.param_groups):
            with named(f"group {number}"):
                rules.append(checked_rule(self.rule_of, other))
        # Of all groups at once: from here on, torch.compile guards the states that it has seen.
        for other, rule in zip(self.param_groups, rules, strict=True):
            for p in other["params"]:
                if p.grad is not None and p in self.state:
                    drop_stale_states(p, rule, other, self.state[p])
        # All are checked before the first state is made.
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
            del options["lr"]  # which the graph reads
        if not all(map(is_builtin, options.values())):
            return operator.encode(rule), None
        numbers = {k: v for k, v in options.items() if k != "lr" and _is_number(v)}
        return operator.encode(rule), tuple(numbers.items())

    def _traceable(self) -> bool:
        stepper = self.stepper
        alone = self.overlap_hook is None and stepper.norm_group is None and stepper.skip_if is None
        return alone and getattr(self, "found_inf", None) is None

    def _step_traced(self) -> None:
        gathered = []
        norm = None
        for group in self.param_groups:
            weights: list[Tensor] = []
            grads: list[Tensor] = []
            states: list[Tensor] = []
            counters: list[Tensor] = []
            masters: list[Tensor] = []
            rule, numbers = self._init_group(group, weights, grads, states, counters, masters)
            # torch.compile lets a float that has changed once vary, without another look at what
            # was made of it. Compared with a constant, it is guarded, and traced anew.
            if numbers is None or any(group[name] != value for name, value in numbers):
                self._step_outside_graph()
                return
            if len(weights) > 0:
                gathered.append((group, rule, weights, grads, states, counters, masters))
        if any(group["max_grad_norm"] is not None for group, *_ in gathered):
            norm = torch.ops.fastlars.square_norm(
                [w for _, _, weights, *_ in gathered for w in weights],
                [g for _, _, _, grads, *_ in gathered for g in grads],
                [len(grads) for _, _, _, grads, *_ in gathered],
            )
        for group, rule, weights, grads, states, counters, masters in gathered:
            lr = group["lr"]
            is_tensor = isinstance(lr, Tensor)
            torch.ops.fastlars.step(
                rule,
                weights,
                grads,
                states,
                counters,
                masters,
                None if is_tensor else lr,
                lr if is_tensor else None,
                -1.0 if group["maximize"] else 1.0,
                norm,
                group["max_grad_norm"],
                group["stochastic_rounding"],
            )
