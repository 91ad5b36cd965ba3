"""FusedOptimizer: the contract of torch.optim.Optimizer, which all optimizers share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, overload

import torch
from torch._compile import _disable_dynamo
from torch.autograd import profiler
from torch.optim import optimizer

from fastlars.optim import checkpoint
from fastlars.optim.checks import check_lr, check_shared_memory, checked_rule, errors_at
from fastlars.optim.compile.tracing import TracedStep
from fastlars.optim.execute import BoundBatch, StepResults
from fastlars.optim.group_entries import count_step, ensure_step_count, pop_param_names
from fastlars.optim.norm import check_norm
from fastlars.optim.options import OPTIONS, dtypes_to_names
from fastlars.optim.planner import Planner, located_parameters
from fastlars.optim.stepper import SkipIf, Stepper, StepReadings
from fastlars.rules import Rule, adapts

if TYPE_CHECKING:
    from fastlars.optim.norm import NormGroup

Params = Iterable[Any]


class OverlapHook(Protocol):
    """Takes the step instead of the optimizer: the engine of ``fastlars.step_in_backward`` or
    ``fastlars.distributed.overlap``. Not DDP's communication hook, which calls it for every bucket.
    """

    def may_write(self) -> bool:
        """Whether parameters change before ``step()``."""
        ...

    def check_whole(self) -> None:
        """Raise where a state_dict would hold half a step."""
        ...

    def loaded(self) -> None:
        """A state_dict was loaded."""
        ...

    def step(self) -> StepResults | None:
        """Finish this step: every parameter updated and reported; None if skipped."""
        ...


def _unless_watched(plain: Callable[..., Any], watched: Callable[..., Any]) -> Callable[..., Any]:
    """A step that calls torch's wrapper ``watched`` only while hooks or a profiler need it.

    The wrapper enters a region of the profiler, which costs a sixth of a step's host time even
    while no profiler runs.
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


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Lightning, Fabric and Accelerate."""
    inner = getattr(optimizer, "optimizer", None)
    return inner_optimizer(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


class FusedOptimizer(TracedStep, StepReadings, torch.optim.Optimizer):
    """Steps all parameters of a group in one call of a compiled back end.

    A subclass gives its rule. A step first checks everything, and takes the addresses of every
    tensor of every group; an error leaves parameters and states as they were.
    """

    rule: ClassVar[type[Rule]]
    # Options that no other class has: a state_dict whose groups have one of them is of this class.
    own_options: ClassVar[frozenset[str]] = frozenset()
    # Optimizers of torch whose states mean the same.
    loads_from: ClassVar[tuple[checkpoint.ForeignOptimizer, ...]] = ()

    # No defaults on the class: Lightning's wrapper is a subclass of the optimizer's class, and
    # would find a default there instead of the attribute of the optimizer that it wraps.
    planner: Planner  # turns the parameter groups into bound batches
    stepper: Stepper  # runs bound batches, with the global norm and the decision to skip
    overlap_hook: OverlapHook | None  # takes the step instead, while an overlap is on

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        norm_group: NormGroup | None = None,
        skip_if: SkipIf | None = None,
    ) -> None:
        if defaults["lr"] is not None:
            check_lr(defaults["lr"])
        self.stepper = Stepper(norm_group, skip_if)
        self.overlap_hook = None
        super().__init__(params, OPTIONS | defaults)
        self.planner = Planner(type(self).rule_of, self.defaults)

    @classmethod
    def rule_of(cls, group: dict[str, Any]) -> Rule:
        """The rule with a group's hyper-parameters; ValueError or TypeError if one is invalid."""
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
        """Read by GradScaler: True leaves unscaling and skipping to ``step``.

        Lightning then refuses to clip gradients, and Accelerate does not see that a step was
        skipped. So it is True only

        * under an overlap that writes during backward, which so sees a GradScaler and refuses it;
        * where all groups ask for it;
        * where a group leaves it open and a GradScaler cannot do it: it does not unscale gradients
          of float16 parameters, and its host cannot skip what a CUDA graph replays.
        """
        asked = [group["fused_unscale"] for group in self.param_groups]
        if self.overlap_hook is not None and self.overlap_hook.may_write():
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
            kind.step = _unless_watched(plain, kind.step)  # type: ignore[method-assign]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; ValueError or TypeError if its values are out of range.

        Unlike in torch, groups with names and groups without may be mixed:
        ``fastlars.parameter_groups`` always names parameters.
        """
        names = pop_param_names(param_group)
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
            with errors_at(f"group {number}"):
                if self.counts_steps:
                    ensure_step_count(group, self.state)
                checked_rule(self.rule_of, group)
            if needs := self.stepper.needs_norm(self.param_groups):
                check_norm(needs, self.stepper.owner, self.stepper.norm_group)
            check_shared_memory(located_parameters(self.param_groups))
        except (RuntimeError, TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        # Its own: a shallow copy that forgot the last step would make the original forget it too.
        return {**super().__getstate__(), "stepper": copy.copy(self.stepper)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "stepper" not in vars(self):  # unpickled, or a copy; else torch loads a state_dict
            state = {"overlap_hook": None, **state}
            state.setdefault("stepper", Stepper())
        super().__setstate__(state)
        # torch adds "differentiable" to the defaults, from where it would get into every group.
        self.defaults.pop("differentiable", None)
        self._forget_plans()
        for group in self.param_groups:
            for name, value in (OPTIONS | self.defaults).items():
                group.setdefault(name, value)
            if self.counts_steps:
                ensure_step_count(group, self.state)

    def _forget_plans(self) -> None:
        self.planner = Planner(type(self).rule_of, self.defaults)
        self.stepper.forget()

    def state_dict(self) -> dict[str, Any]:
        """Same as ``torch.optim.Optimizer.state_dict()``."""
        if self.overlap_hook is not None:
            self.overlap_hook.check_whole()
        # Before the user's hooks, so that what they return stays as they made it.
        first = self.register_state_dict_post_hook(dtypes_to_names, prepend=True)
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
        self._forget_plans()
        if self.overlap_hook is not None:
            self.overlap_hook.loaded()

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

    def _step_eagerly(self) -> None:
        hook = self.overlap_hook
        results = self.step_batches(self.bind_groups) if hook is None else hook.step()
        if results is not None:
            self.stepper.results = results
            self._count_steps(host_knows=self.stepper.verdict is None)

    def _count_steps(self, host_knows: bool) -> None:
        if not self.counts_steps:
            return
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                count_step(group, self.state, host_knows and not group["capturable"])

    # A step under overlap, a GradScaler, a norm group or skip_if cannot be traced. Left to the
    # compiler, torch 2.11 fails where it resumes tracing: at an assignment to the optimizer.
    # _disable_dynamo is torch.compiler.disable, but imports torch._dynamo only when the step is
    # first called: `import fastlars` would take 2 s longer.
    _step_outside_graph = _disable_dynamo(_step_eagerly)

    def bind_groups(self) -> list[BoundBatch]:
        """All batches of all groups, checked, and bound to the gradients that there are now.

        For code that steps by itself, as an overlap hook does; call it under ``torch.no_grad()``.
        """
        return self.planner.bind_groups(self.param_groups, self.state)

    def step_batches(self, bind: Callable[[], list[BoundBatch]]) -> StepResults | None:
        """Step what ``bind`` returns; None where the step was skipped.

        For code that steps by itself, as an overlap hook does; call it under ``torch.no_grad()``.
        """
        return self.stepper.step(
            self.param_groups,
            bind,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self.planner.reads_device,
        )
