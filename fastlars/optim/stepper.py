"""Stepper: the global gradient norm of a step, the decision to skip it, and the step itself."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlars.backends.float64 import has_float64
from fastlars.backends.upload import is_capturing
from fastlars.optim.dtensor import all_reduce_sums, plain_shard
from fastlars.optim.execute import BoundBatch, StepResults, check_recording, run_step
from fastlars.optim.norm import NormReducer, check_norm, owner_from_stack
from fastlars.optim.scalars import Scalars, scalars_for, square_of_norm, to_device
from fastlars.ranges import real, unboxed

SkipIf: TypeAlias = float | Callable[[Tensor], Tensor | bool]
Groups: TypeAlias = list[dict[str, Any]]


def checked_skip_if(skip_if: Any) -> SkipIf | None:
    """``skip_if`` with a threshold as a float; raises unless it is one, a callable or None."""
    if skip_if is None or callable(skip_if):
        return skip_if
    threshold = real("skip_if", skip_if)
    if not threshold > 0.0:
        raise ValueError(
            f"skip_if must be above 0, a callable, or None to skip no step, got {skip_if}"
        )
    return threshold


def decide(skip_if: SkipIf, norm: Tensor) -> bool | Tensor:
    """Whether to skip a step of this norm: a bool, or a 0-dim bool tensor."""
    if not callable(skip_if):
        # This form also skips norms that are infinite or NaN, whatever the threshold.
        return (norm <= min(skip_if, sys.float_info.max)).logical_not()
    decision: Any = skip_if(norm)
    on_device = isinstance(decision, Tensor) and decision.device == norm.device
    if is_capturing(norm.device) and not on_device:
        raise RuntimeError(
            "skip_if has decided on the host while a CUDA graph is recorded, which would decide "
            "the same at every replay: return a tensor on the device of the norm"
        )
    if isinstance(decision, Tensor) and decision.numel() == 1:
        return decision.reshape(()).ne(0)
    decision = unboxed(decision)
    if not isinstance(decision, bool):
        is_tensor = isinstance(decision, Tensor)
        what = f"shape {tuple(decision.shape)}" if is_tensor else type(decision).__name__
        raise TypeError(f"skip_if must return a bool or a tensor of one element, got {what}")
    return decision


class Stepper:
    """Runs bound batches: measures the global norm, decides by it, clips, and steps or skips.

    Attributes:
        norm_group: the processes over which the square of the norm is summed, or None.
        skip_if: decides which steps are skipped, or None.
        owner: what gave the optimizer a part of the parameters, as ``ZeroRedundancyOptimizer``.
        skipped: how many steps were skipped, a 0-dim int64 tensor.
        results: parameters, trust ratios and norms of the last step; empty if the host skipped it.
        square: the square of the last step's global norm; None where nothing needed it.
        verdict: whether the device has skipped the last step; None where the host decided.
    """

    results: StepResults
    square: Tensor | None
    verdict: Tensor | None

    def __init__(self, norm_group: Any = None, skip_if: Any = None) -> None:
        self.norm_group = None if norm_group is None else NormReducer(norm_group)
        self.owner = owner_from_stack()
        self.skip_if = checked_skip_if(skip_if)
        self._skipped: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Forget the results of the last step: states were loaded, or this is a copy."""
        self.results, self.square, self.verdict = [], None, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy without these would clip by a part of the norm, or take every step, silently.
        names = ("norm_group", "owner", "skip_if", "_skipped")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget()

    @property
    def skipped(self) -> Tensor:
        if self._skipped is None:
            # The first reader may be in inference mode, whose tensors cannot be changed later.
            with torch.inference_mode(False):
                self._skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        return self._skipped

    def needs_norm(self, groups: Groups) -> str:
        """The argument that needs the global norm; empty where none does."""
        if any(group["max_grad_norm"] is not None for group in groups):
            return "max_grad_norm"
        return "" if self.skip_if is None else "skip_if"

    def step(
        self,
        groups: Groups,
        bind: Callable[[], list[BoundBatch]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        reads_device: Callable[[], bool],
    ) -> StepResults | None:
        """Step what ``bind`` returns; None where the host has skipped the step.

        Args:
            groups: the optimizer's parameter groups.
            bind: binds all batches that this step has left to do. Not called for a step that is
                known to be skipped.
            grad_scale: a GradScaler's scale, if it left unscaling to the step.
            found_inf: its verdict: where it is not 0, the step is skipped.
            reads_device: whether the step leaves ``found_inf`` on its device. If not, the host
                reads it before anything is bound.
        """
        needs = self.needs_norm(groups)
        is_local = self.norm_group is None or not needs  # else other processes wait for this one
        if is_local and found_inf is not None and not reads_device() and float(found_inf) != 0.0:
            self._skip_unmeasured(needs)
            return None
        if needs:
            check_norm(needs, self.owner, self.norm_group)
        batches = bind()
        check_recording(batches)
        scalars = scalars_for((b.backend for b in batches), grad_scale, found_inf)
        if scalars.skip and is_local:
            self._skip_unmeasured(needs)
            return None
        self.square = gradient_sums = None
        if needs:
            square, gradient_sums = self._square_of_norm(groups, batches, scalars)
            self.decide(square, scalars)
        if scalars.skip:
            self.skip()
            return None
        return self.run(batches, scalars, gradient_sums)

    def decide(self, square: Tensor, scalars: Scalars) -> None:
        """Put the global norm, given its square, into the scalars, and whether to skip the step."""
        self.square = square
        scalars.set_square(square)
        if scalars.has_scaler and self.norm_group is not None:
            # The GradScaler of any process may have found an inf or NaN.
            scalars.skip_where(square.isfinite().logical_not())
        if self.skip_if is not None and not scalars.skip:
            scalars.skip_where(decide(self.skip_if, square.sqrt()))

    def run(
        self,
        batches: list[BoundBatch],
        scalars: Scalars,
        gradient_sums: list[Tensor] | None = None,
    ) -> StepResults:
        """Step the batches, which the host does not skip; count the step where the device does."""
        verdict = scalars.verdict()
        if verdict is not None:
            self.count_skips_on(verdict.device)
        results = run_step(batches, scalars, gradient_sums)
        if verdict is not None:
            self.skipped.add_(to_device(verdict, self.skipped.device))
        self.verdict = verdict
        return results

    def _skip_unmeasured(self, needs: str) -> None:
        """Skip a step whose gradients are not finite, as a GradScaler has found."""
        unknown = torch.full((), math.nan, dtype=torch.float64, device="cpu")
        self.square = unknown if needs else None
        self.skip()

    def skip(self) -> None:
        """Note that the host has skipped a step."""
        self.results, self.verdict = [], None
        self.skipped.add_(1)

    def count_skips_on(self, device: torch.device) -> None:
        """Move the count of skipped steps to a GPU before its first verdict; it stays there."""
        if self.skipped.device.type == "cpu" != device.type:
            if is_capturing(device):
                raise RuntimeError(
                    "a CUDA graph would begin to count skipped steps anew at every replay: take a "
                    "step with skip_if, or with the GradScaler, before recording one"
                )
            with torch.inference_mode(False):
                self._skipped = to_device(self.skipped, device)

    def _square_of_norm(
        self, groups: Groups, batches: list[BoundBatch], scalars: Scalars
    ) -> tuple[Tensor, list[Tensor]]:
        """The square of the global norm, over all shards and the processes of ``norm_group``; and
        what it is the sum of, the sums of squares of every batch."""
        square = None
        sums = all_reduce_sums([(b.batch.rows, b.square_norms(scalars)) for b in batches])
        if batches:
            square = square_of_norm(sums, scalars.on_device)
        if square is not None and self.norm_group is None:
            return square, sums
        first = next((p for group in groups for p in group["params"]), None)
        device = torch.device("cpu") if first is None else plain_shard(first).device
        if square is None:  # a process without gradients has to take part too
            place = device if has_float64(device) else "cpu"
            square = torch.zeros((), dtype=torch.float64, device=place)
        if self.norm_group is not None:
            square = self.norm_group.sum(scalars.unless_skipped(square), device)
        return square, sums


class StepReadings:
    """What can be read from an optimizer after a step.

    Everything is read from ``self.stepper``, which Lightning's wrapper, a subclass of the
    optimizer's class, takes from the optimizer that it wraps.
    """

    stepper: Stepper

    @property
    def skip_if(self) -> SkipIf | None:
        """Decides which steps are skipped, as the argument of this name. May change at any time."""
        return self.stepper.skip_if

    @skip_if.setter
    def skip_if(self, value: SkipIf | None) -> None:
        self.stepper.skip_if = checked_skip_if(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients together in the last step, a 0-dim float64 tensor.

        Over all groups, shards and processes of ``norm_group``, unscaled, and before the clip. It
        is measured where a group has a ``max_grad_norm`` (``math.inf`` clips nothing), or where
        ``skip_if`` is set; None after a step without either, and before the first.

        A step without a gradient has a norm of 0. After a step that the host skipped because of a
        ``GradScaler``, the norm is NaN: its gradients were not finite, and were not measured.

        The tensor is on the GPU where a step reads its scalars there, and nothing waits for it
        until ``float(optimizer.grad_norm)`` does. Steps inside ``torch.compile`` do not change it.

        Example:
            >>> import math, torch, fastlars
            >>> w = torch.nn.Parameter(torch.ones(4))
            >>> optimizer = fastlars.LARS([w], lr=1.0, max_grad_norm=math.inf)
            >>> (3.0 * w).sum().backward()
            >>> optimizer.step()
            >>> float(optimizer.grad_norm)
            6.0
        """
        square = self.stepper.square
        return None if square is None else square.sqrt()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``skip_if`` and, with ``fused_unscale``, a ``GradScaler`` have skipped.

        A 0-dim int64 tensor that goes on counting, also at every replay of a CUDA graph. The first
        step whose decision stays on the GPU moves it there: read the attribute again after that
        step. It is not part of ``state_dict()``. A ``GradScaler`` without ``fused_unscale`` does
        not call ``step`` at all when it skips, and this does not count it.
        """
        return self.stepper.skipped

    def trust_ratios(self) -> dict[Tensor, float]:
        """The last step's trust ratio of every parameter that it changed; 1 where not adapted.

        Empty before the first step and after one that was skipped. Steps inside
        ``torch.compile`` do not change it.
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
        verdict = self.stepper.verdict
        if verdict is not None and bool(verdict):
            return {}
        return {
            p: q
            for result in self.stepper.results
            for p, q in zip(result.params, result.report[:, 0].tolist(), strict=True)
        }
