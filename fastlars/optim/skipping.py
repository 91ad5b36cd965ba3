"""The global gradient norm of a step, what decides to skip the step, and how many were skipped."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlars.backends.upload import is_capturing
from fastlars.optim.norm import Processes
from fastlars.optim.numbers import Numbers, moved
from fastlars.optim.sharded import complete, shard
from fastlars.optim.work import Taken, Work, take
from fastlars.rules import real, unboxed

SkipIf: TypeAlias = float | Callable[[Tensor], Tensor | bool]


def checked(skip_if: Any) -> SkipIf | None:
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
        # So that norms that are infinite or NaN are skipped, whatever the threshold.
        return (norm <= min(skip_if, sys.float_info.max)).logical_not()
    found: Any = skip_if(norm)
    there = isinstance(found, Tensor) and found.device == norm.device
    if is_capturing(norm.device) and not there:
        raise RuntimeError(
            "skip_if has decided on the host while a CUDA graph is recorded, which would decide "
            "the same at every replay: return a tensor on the device of the norm"
        )
    if isinstance(found, Tensor) and found.numel() == 1:
        return found.reshape(()).ne(0)
    found = unboxed(found)
    if not isinstance(found, bool):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"skip_if must return a bool or a tensor of one element, got {what}")
    return found


@dataclass
class Skipping:
    """What decides to skip a step, and how many steps were skipped.

    Kept in one object, because Lightning's wrapper is a subclass of the optimizer's class: its
    properties read this object from the wrapped optimizer.
    """

    skip_if: SkipIf | None = None
    count: Tensor | None = None


class SkippingStep:
    """What :class:`FusedOptimizer` does with the global norm: measure, decide, clip and count."""

    param_groups: list[dict[str, Any]]
    _norm_group: Processes | None
    _last: Taken
    _skipping: Skipping
    # Of the last step: the square of the norm, and whether the device has skipped it, where the
    # device alone knows.
    _square: Tensor | None
    _verdict: Tensor | None

    @property
    def skip_if(self) -> SkipIf | None:
        """Decides which steps are skipped, as the argument of this name. May change at any time."""
        return self._skipping.skip_if

    @skip_if.setter
    def skip_if(self, value: SkipIf | None) -> None:
        self._skipping.skip_if = checked(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients together in the last step, a 0-dim float64 tensor.

        Over all groups, shards and processes of ``norm_group``, unscaled, and not yet clipped. It
        is measured where a group has a ``max_grad_norm``, of which ``math.inf`` clips nothing, or
        where ``skip_if`` is set; None after a step without either, and before the first.

        A step without a gradient has a norm of 0. NaN also stands for the gradients of a step
        that a ``GradScaler`` had the host skip: they are not finite, and are not read.

        The tensor is on the GPU where a step reads its numbers there, and nothing waits for it
        until ``float(optimizer.grad_norm)`` does. Steps inside ``torch.compile`` leave it as it is.

        Example:
            >>> import math, torch, fastlars
            >>> w = torch.nn.Parameter(torch.ones(4))
            >>> optimizer = fastlars.LARS([w], lr=1.0, max_grad_norm=math.inf)
            >>> (3.0 * w).sum().backward()
            >>> optimizer.step()
            >>> float(optimizer.grad_norm)
            6.0
        """
        return None if self._square is None else self._square.sqrt()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``skip_if`` and, with ``fused_unscale``, a ``GradScaler`` have skipped.

        A 0-dim int64 tensor that goes on counting, also at every replay of a CUDA graph. The first
        step whose decision stays on the GPU moves it there: read the attribute again after that
        step. It is not part of ``state_dict()``. A ``GradScaler`` without
        ``fused_unscale`` does not call ``step`` at all, which is not counted.
        """
        kept = self._skipping
        if kept.count is None:
            with torch.inference_mode(False):  # an evaluation may be the first to ask
                kept.count = torch.zeros((), dtype=torch.int64, device="cpu")
        return kept.count

    def _needs_norm(self) -> str:
        """The argument that needs the global norm; empty where nothing does."""
        if any(group["max_grad_norm"] is not None for group in self.param_groups):
            return "max_grad_norm"
        return "" if self.skip_if is None else "skip_if"

    def _sums_over_processes(self) -> bool:
        """Whether a step of this process waits for the norms of others."""
        return self._norm_group is not None and bool(self._needs_norm())

    def _take(self, works: list[Work], now: Numbers) -> Taken | None:
        """Measure the norm of the works where it is needed, decide by it, and take or skip the
        step: the parameters and trust ratios of the works, None where the host has skipped it.

        The works are all that a step has to do, or nobody needs the norm.
        """
        if now.skip and not self._sums_over_processes():
            self._skip_unmeasured()
            return None
        self._square = None
        if self._needs_norm():
            self._square = self._square_norm(works, now)
            now.take_square(self._square)
            if now.scaled and self._sums_over_processes():
                # The GradScaler of any process may have found what is not finite.
                now.skip_where(self._square.isfinite().logical_not())
            if self.skip_if is not None and not now.skip:
                now.skip_where(decide(self.skip_if, self._square.sqrt()))
        if now.skip:
            self._skip()
            return None
        verdict = now.verdict()
        if verdict is not None:
            self._count_on(verdict.device)
        taken = take(works, now)
        if verdict is not None:
            self.skipped_steps.add_(moved(verdict, self.skipped_steps.device))
        self._verdict = verdict
        return taken

    def _skip_unmeasured(self) -> None:
        """Skip a step in which a GradScaler has found what is not finite."""
        unknown = torch.full((), math.nan, dtype=torch.float64, device="cpu")
        self._square = unknown if self._needs_norm() else None
        self._skip()

    def _skip(self) -> None:
        self._last, self._verdict = [], None
        self.skipped_steps.add_(1)

    def _count_on(self, device: torch.device) -> None:
        """Have the count on a GPU before the first verdict from one, and from then on."""
        if self.skipped_steps.device.type == "cpu" != device.type:
            if is_capturing(device):
                raise RuntimeError(
                    "a CUDA graph would begin to count skipped steps anew at every replay: take a "
                    "step with skip_if, or with the GradScaler, before recording one"
                )
            with torch.inference_mode(False):
                self._skipping.count = moved(self.skipped_steps, device)

    def _square_norm(self, works: list[Work], now: Numbers) -> Tensor:
        """The square of the global norm, over all shards and the processes of ``norm_group``."""
        parts = [(work.sublist.shards, work.square_norms(now)) for work in works]
        group = self._norm_group
        if parts and group is None:
            return now.square(complete(parts))
        first = next((p for each in self.param_groups for p in each["params"]), None)
        device = torch.device("cpu") if first is None else shard(first).device
        # A process without gradients has to take part too.
        none = torch.zeros((), dtype=torch.float64, device=device)
        square = now.square(complete(parts)) if parts else none
        return square if group is None else group.sum(now.unless_skipped(square), device)
