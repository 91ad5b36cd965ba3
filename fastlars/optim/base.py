"""FusedOptimizer: what all optimizers share: everything but their rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import profiler
from torch.optim import optimizer

import fastlars._C as _C
from fastlars.backends.base import Mismatch
from fastlars.optim import checkpoint
from fastlars.optim.checks import check_lr, check_options, check_overlap
from fastlars.optim.norm import Processes, check_norm, owner_of_this
from fastlars.optim.numbers import numbers
from fastlars.optim.options import OPTIONS
from fastlars.optim.plan import Plan, location, options_of
from fastlars.optim.shown import count_step, show_steps, take_names
from fastlars.optim.skipping import SkipIf, Skipping, checked
from fastlars.optim.traced import TracedStep
from fastlars.optim.values import kept, unchanged
from fastlars.optim.work import Taken, Work, check_making, check_recording
from fastlars.rules import Rule, adapts

if TYPE_CHECKING:
    from fastlars.optim.norm import NormGroup

Params = Iterable[Any]


def unwatched(plain: Callable[..., Any], watched: Callable[..., Any]) -> Callable[..., Any]:
    """``watched``, which is what torch made of the step ``plain``, where anybody watches.

    A region of the profiler costs a sixth of a step's host time even while no profiler runs.
    """

    @functools.wraps(watched)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_watched = (
            torch.compiler.is_compiling()
            or getattr(profiler, "_is_profiler_enabled", True)
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )
        return (watched if is_watched else plain)(self, *args, **kwargs)

    return step


class Ahead(Protocol):
    """Steps parameters before ``step()`` does, as fastlars.distributed.overlap has it."""

    def may_write(self) -> bool:
        """Whether parameters change before ``step()``."""
        ...

    def step(self) -> Taken | None:
        """Finish this step: every parameter updated, with its trust ratio; None if skipped."""
        ...


class FusedOptimizer(TracedStep, torch.optim.Optimizer):
    """Steps all parameters of a group in one call of a compiled back end.

    A subclass gives its rule. A step first checks everything, and takes the addresses of every
    tensor of every group; an error leaves parameters and states as they were.
    """

    rule: ClassVar[type[Rule]]
    # Options that the groups of this class have, and of no other: one of them shows whose they are.
    marks: ClassVar[frozenset[str]] = frozenset()
    # Optimizers of torch whose states mean the same.
    loads_from: ClassVar[tuple[checkpoint.Source, ...]] = ()

    # No defaults: wrappers that are subclasses, as Lightning's, ask the optimizer for these.
    _ahead: Ahead | None
    _norm_group: Processes | None
    _owner: str | None

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        norm_group: NormGroup | None = None,
        skip_if: SkipIf | None = None,
    ) -> None:
        if defaults["lr"] is not None:
            check_lr(defaults["lr"])
        self._norm_group = None if norm_group is None else Processes(norm_group)
        self._skipping = Skipping(checked(skip_if))
        self._ahead = None
        self._owner = owner_of_this()
        self._forget()
        super().__init__(params, OPTIONS | defaults)

    @classmethod
    def rule_of(cls, group: dict[str, Any]) -> Rule:
        """The rule that a group's hyper-parameters make. ValueError or TypeError if they do not."""
        values = {each.name: group[each.name] for each in fields(cls.rule)}
        if "adapt" in values:
            values["adapt"] = adapts(group)
        return cls.rule(**values)

    @property
    def counts_steps(self) -> bool:
        """Whether group["step"] shows the steps taken, where training scripts may read it."""
        return type(self).rule.counts_steps

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: whether ``step`` takes its scale and its verdict.

        Lightning then refuses to clip gradients, and Accelerate does not see that a step was
        skipped. So it is True only

        * under an overlap that writes during backward, which so sees a GradScaler and refuses it;
        * where all groups ask for it;
        * where a group leaves it open and a GradScaler cannot do it: it does not unscale gradients
          of float16 parameters, and its host cannot skip what a CUDA graph replays.
        """
        asked = [group["fused_unscale"] for group in self.param_groups]
        if self._ahead is not None and self._ahead.may_write():
            return True
        if None not in asked:
            return all(asked)
        return any(
            group["capturable"] or any(p.dtype == torch.float16 for p in group["params"])
            for group in self.param_groups
        )

    def _patch_step_function(self) -> None:
        # torch's, which wraps step in its hooks and its profiler's region, once for each class.
        kind, plain = type(self), type(self).step
        super()._patch_step_function()
        if kind.step is not plain:
            kind.step = unwatched(plain, kind.step)  # type: ignore[method-assign]

    def _forget(self) -> None:
        self._plans: list[Plan | None] = []
        self._rules: list[tuple[tuple[Any, ...], Rule] | None] = []
        self._last = []
        self._square = self._verdict = None
        self._planned_states: list[dict[str, Any]] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; ValueError or TypeError if its values are out of range.

        Other than in torch, groups with names and groups without go together:
        :func:`fastlars.parameter_groups` names parameters unasked.
        """
        names = take_names(param_group)
        hidden = [(g, g.pop("param_names")) for g in self.param_groups if "param_names" in g]
        try:
            super().add_param_group(param_group)
        finally:
            for group, known in hidden:
                group["param_names"] = known
            if names is not None:
                param_group["param_names"] = names
        number = len(self.param_groups) - 1
        group = self.param_groups[number]
        try:
            try:
                if self.counts_steps:
                    show_steps(group, self.state)
                check_lr(group["lr"])
                check_options(group)
                self.rule_of(group)
            except (TypeError, ValueError) as error:
                raise type(error)(f"group {number}: {error}") from None
            if needs := self._needs_norm():
                check_norm(needs, self._owner, self._norm_group)
            check_overlap(self._places())
        except (RuntimeError, TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _places(self) -> list[tuple[Tensor, str]]:
        return [
            (p, location(number, i))
            for number, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copy that forgot them would clip by a part of the norm, or take every step, without a
        # word.
        names = ("_norm_group", "_owner", "_skipping")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {"_ahead": None, "_norm_group": None, "_owner": None, "_skipping": Skipping()}
        super().__setstate__({**own, **state} if "_skipping" not in vars(self) else state)
        # torch adds it to the defaults, and so it would get into every group and checkpoint.
        self.defaults.pop("differentiable", None)
        self._forget()
        for group in self.param_groups:
            for name, value in (OPTIONS | self.defaults).items():
                group.setdefault(name, value)
            if self.counts_steps:
                show_steps(group, self.state)

    def state_dict(self) -> dict[str, Any]:
        """Same as ``torch.optim.Optimizer.state_dict()``."""
        # Before the user's own hooks, whose result is what they return.
        first = self.register_state_dict_post_hook(checkpoint.portable, prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave, from this class or one whose state means the same.

        States keep their own types (float32 momentum of bfloat16 weights stays float32), and take
        the device and the memory layout of their parameters.

        Raises:
            ValueError: the dict is of another optimizer, or its tensors do not fit the parameters.
                Nothing is loaded then.
        """
        checkpoint.load(self, super().load_state_dict, state_dict)
        self._forget()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._step_eagerly()
        elif self._traceable():
            self._step_traced()
        else:
            self._step_outside_graph()
        return loss

    def _traceable(self) -> bool:
        alone = self._ahead is None and self._norm_group is None and self.skip_if is None
        return alone and getattr(self, "found_inf", None) is None

    def _step_eagerly(self) -> None:
        taken = self._step_all(self._prepare) if self._ahead is None else self._ahead.step()
        if taken is not None:
            self._last = taken
            self._count_steps(host_knows=self._verdict is None)

    def _step_all(self, prepare: Callable[[], list[Work]]) -> Taken | None:
        """Step what ``prepare`` gives; None where the step is skipped."""
        found_inf = getattr(self, "found_inf", None)
        alone = not self._sums_over_processes()
        if alone and found_inf is not None and not self._reads_device() and float(found_inf) != 0.0:
            self._skip_unmeasured()
            return None
        if needs := self._needs_norm():
            check_norm(needs, self._owner, self._norm_group)
        works = prepare()
        check_recording(works)
        now = numbers(
            all(work.backend.reads_device for work in works),
            getattr(self, "grad_scale", None),
            found_inf,
        )
        return self._take(works, now)

    def _count_steps(self, host_knows: bool) -> None:
        if not self.counts_steps:
            return
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                count_step(group, self.state, host_knows and not group["capturable"])

    # A step under overlap, a GradScaler, a norm group or skip_if cannot be traced. Left to the
    # compiler, torch 2.11 fails where it resumes tracing: at an assignment to the optimizer. This
    # is torch.compiler.disable as torch's own optimizers use it: torch._dynamo is imported by the
    # first call, and not, for 2 s, by `import fastlars`.
    _step_outside_graph = _disable_dynamo(_step_eagerly)

    def trust_ratios(self) -> dict[Tensor, float]:
        """The last step's trust ratio of every parameter that it changed; 1 where not adapted.

        Empty before the first step and after one that was skipped. Steps inside
        ``torch.compile`` leave it as it is.
        By name: ``{name: ratios[p] for name, p in model.named_parameters() if p in ratios}``.

        Example:
            >>> import torch, fastlars
            >>> w = torch.nn.Parameter(torch.ones(4))
            >>> optimizer = fastlars.LARS([w], lr=1.0)
            >>> w.sum().backward()
            >>> optimizer.step()
            >>> [round(q, 6) for q in optimizer.trust_ratios().values()]
            [0.001]
        """
        if self._verdict is not None and bool(self._verdict):
            return {}
        return {
            p: q
            for params, ratios in self._last
            for p, q in zip(params, ratios.tolist(), strict=True)
        }

    def _rule(self, number: int, group: dict[str, Any]) -> Rule:
        """The group's rule; made anew, and so checked, only when a value has changed."""
        check_lr(group["lr"])
        values = tuple(group[name] for name in self.defaults if name != "lr")
        known = self._rules[number]
        if known is not None and unchanged(known[0], values):
            return known[1]
        if checkpoint.take_types(group):  # of a state_dict that ZeroRedundancyOptimizer has loaded
            values = tuple(group[name] for name in self.defaults if name != "lr")
        check_options(group)
        rule = self.rule_of(group)
        self._rules[number] = (kept(values), rule)
        plan = self._plans[number]
        if plan is not None and plan.options != options_of(group, rule):
            self._plans[number] = None
        return rule

    def _prepare(self) -> list[Work]:
        groups = self.param_groups
        if len(self._plans) != len(groups) or not self._states_are_planned():
            self._plans, self._rules = [None] * len(groups), [None] * len(groups)
        works = []
        for (group, rule), bound in zip(*self._bind(groups), strict=True):
            works += [Work(group, rule, sublist, b) for sublist, b in bound]
        return works

    def _plan_again(self, number: int) -> None:
        """One group, with all checks: parameters, states or options are others than before."""
        group = self.param_groups[number]
        plan = Plan(group, number, self._rule(number, group), self.state)
        self._plans[number] = plan.ready()
        self._note_states()

    def _reads_device(self) -> bool:
        """Whether the last step's back ends all read their numbers on the device."""
        plans = [plan for plan in self._plans if plan is not None]
        sublists = [sublist for plan in plans for sublist in plan.sublists]
        return bool(sublists) and all(sublist.backend.reads_device for sublist in sublists)

    def _note_states(self) -> None:
        """After states were made: these are what plans hold."""
        self._planned_states = list(self.state.values())

    def _states_are_planned(self) -> bool:
        """Whether nobody has cleared ``state`` or put another dict into it."""
        return _C.holds(self.state, self._planned_states)

    def _bind(self, groups: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
        """Groups with their rules, and what their plans bound. All groups are checked before the
        first state is made."""
        rules: list[tuple[dict[str, Any], Rule]] = []
        bound: list[Any] = []
        new: dict[int, Plan] = {}
        for number, group in enumerate(groups):
            try:
                rule = self._rule(number, group)
            except (TypeError, ValueError) as error:
                raise type(error)(f"group {number}: {error}") from None
            rules.append((group, rule))
            plan = self._plans[number]
            known = plan.known if plan is not None else None
            try:
                grads = plan.gradients(group["params"]) if plan is not None else None
                if plan is not None and grads is None:
                    grads = [p.grad for p in group["params"]]
                    plan = self._plans[number] = plan.of_others(group["params"], grads)
                if plan is not None and grads is not None:
                    bound.append(plan.bind(grads))
                    continue
            except (Mismatch, KeyError):
                known = None  # a parameter or a state was replaced: plan again, with all checks
            # First: to find out which back ends there are does not go into a recording either.
            check_making(group, rule, self.state)
            new[number] = Plan(group, number, rule, self.state, known)
            bound.append(None)
        if new:
            check_overlap(self._places())  # lists and memory may have been changed by hand
        for number, plan in new.items():
            self._plans[number] = plan.ready()
            bound[number] = plan.bind([p.grad for p in plan.params])
        if new:
            self._note_states()
        return rules, bound
