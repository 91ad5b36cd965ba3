"""Work: what a step has to do, list by list, once everything is checked and bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlars.backends.base import Backend, StepScalars
from fastlars.backends.upload import keep_for_replays
from fastlars.optim.numbers import Numbers
from fastlars.optim.plan import State, Sublist, lacks_states
from fastlars.optim.sharded import complete, shards
from fastlars.rules import GradientNorm, Rule

# Parameters that were stepped, list by list, and their trust ratios.
Taken: TypeAlias = list[tuple[list[Tensor], Tensor]]


@dataclass
class Work:
    """One sublist, ready to be stepped."""

    group: dict[str, Any]
    rule: Rule
    sublist: Sublist
    bound: Any

    @property
    def backend(self) -> Backend:
        return self.sublist.backend

    @property
    def device(self) -> torch.device:
        return self.sublist.weights[0].device

    @property
    def sign(self) -> float:
        return -1.0 if self.group["maximize"] else 1.0

    def square_norms(self, now: Numbers) -> Tensor:
        """Sums of squares of the gradients, for the global norm."""
        scalars = now.unclipped(self.sign, self.device)
        return self.backend.measure(GradientNorm(), self.bound, scalars)

    def scalars(self, now: Numbers) -> StepScalars:
        """What the back end needs to know of this step."""
        seed = None
        if self.group["stochastic_rounding"] and self.sublist.dtypes.weight == torch.bfloat16:
            # From torch's own generator: torch.manual_seed makes it reproducible, and a saved
            # generator state resumes it.
            seed = int(torch.randint(2**62, (), device="cpu"))
        limit = self.group["max_grad_norm"]
        scalars = now.scalars(self.group["lr"], self.sign, limit, seed, self.device)
        if scalars.device is not None:
            # Not the norm: what a recording has made itself is its own.
            there = replace(scalars.device, square_norm=None)
            keep_for_replays(self.sublist.weights[0], there.given)
        return scalars


def check_recording(works: list[Work]) -> None:
    """Raise where a CUDA graph is recorded that would use this step's numbers at every replay."""
    fixed = any(w.device.type == "cuda" and not w.group["capturable"] for w in works)
    if fixed and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step is recorded into a CUDA graph only with capturable=True")


def check_making(group: dict[str, Any], rule: Rule, state: State) -> None:
    """Raise where a CUDA graph is recorded that would make states anew at every replay."""
    on_gpu = any(p.device.type == "cuda" for p in group["params"])
    recording = on_gpu and torch.cuda.is_current_stream_capturing()
    if recording and lacks_states(group, rule, state):
        raise RuntimeError(
            "a CUDA graph would make states anew at every replay: take a step before recording one"
        )


def take(works: list[Work], now: Numbers) -> Taken:
    """Step every list; the global norm is known where one is needed."""
    each = [work.scalars(now) for work in works]
    sums = _sharded_sums(works, each)
    taken = []
    for i, (work, scalars) in enumerate(zip(works, each, strict=True)):
        if i in sums:
            ratios = work.backend.apply(work.rule, work.bound, scalars, sums[i])
        else:
            ratios = work.backend.step(work.rule, work.bound, scalars)
        taken.append((work.sublist.weights, ratios))
    mark_written(works)
    return taken


def mark_written(works: list[Work]) -> None:
    """Raise the versions of weights, by which autograd notices that a saved tensor was overwritten:
    a write through an address does not raise them."""
    for work in works:
        written = work.sublist.weights
        torch.autograd.graph.increment_version(written)
        for name in work.sublist.path:
            written = shards(written, (name,))
            torch.autograd.graph.increment_version(written)


def _sharded_sums(works: list[Work], each: list[StepScalars]) -> dict[int, Tensor]:
    """Sums of squares over all shards, by the place of the list; of adapted lists alone."""
    places = [i for i, w in enumerate(works) if w.sublist.shards is not None and w.rule.adapt]
    if not places:
        return {}
    parts = [
        (works[i].sublist.shards, works[i].backend.measure(works[i].rule, works[i].bound, each[i]))
        for i in places
    ]
    return dict(zip(places, complete(parts), strict=True))
