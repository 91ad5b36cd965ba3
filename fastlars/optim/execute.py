"""BoundBatch and run_step: execute a step once everything is checked and bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlars.backends.base import Backend, StepScalars
from fastlars.backends.upload import keep_for_replays
from fastlars.optim.dtensor import all_reduce_sums, at_path
from fastlars.optim.plan import TensorBatch
from fastlars.optim.scalars import Scalars
from fastlars.optim.states import States, lacks_states
from fastlars.rules import GradientNorm, Rule


@dataclass
class StepResult:
    """What a step returns of one batch.

    Attributes:
        params: the parameters of the batch.
        rule: the rule that stepped them.
        report: float32 [parameters, 1 + rule.sums]: trust ratios, and the norms that they are made
            of, as ``Backend.apply`` returns them. On the device of the parameters, but on the host
            where the reference back end steps them.
    """

    params: list[Tensor]
    rule: Rule
    report: Tensor


StepResults: TypeAlias = list[StepResult]


@dataclass
class BoundBatch:
    """Parameters of one group whose tensors a back end has checked and bound for this step."""

    group: dict[str, Any]
    rule: Rule
    batch: TensorBatch
    bound: Any
    # Of stochastic rounding, where this is a part of another batch; see StepScalars.
    seed: int | None = None
    streams: Tensor | None = None

    @property
    def backend(self) -> Backend:
        return self.batch.backend

    @property
    def device(self) -> torch.device:
        return self.batch.weights[0].device

    @property
    def sign(self) -> float:
        return -1.0 if self.group["maximize"] else 1.0

    def square_norms(self, scalars: Scalars) -> Tensor:
        """Sums of squares of the gradients, for the global norm."""
        return self.gradient_sums(scalars.unclipped(self.sign, self.device))

    def gradient_sums(self, scalars: StepScalars) -> Tensor:
        """The sum of squares of each scaled gradient."""
        return self.backend.measure(GradientNorm(), self.bound, scalars)

    def measure(self, scalars: StepScalars) -> Tensor:
        """The rule's sums of squares."""
        return self.backend.measure(self.rule, self.bound, scalars)

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded stochastically."""
        return self.group["stochastic_rounding"] and self.batch.dtypes.weight == torch.bfloat16

    def step_scalars(self, scalars: Scalars, writes: bool = True) -> StepScalars:
        """What the back end needs to know of this step; ``writes``: not only to measure."""
        seed = None
        if writes and self.rounds:
            seed = draw_seed() if self.seed is None else self.seed
        limit = self.group["max_grad_norm"]
        given = scalars.of_batch(self.group["lr"], self.sign, limit, seed, self.device)
        if given.device is not None:
            # Not the norm: a recording computes the norm itself, and keeps its memory.
            inputs = replace(given.device, square_norm=None)
            keep_for_replays(self.batch.weights[0], inputs.given)
        return given if seed is None else replace(given, streams=self.streams)


def check_recording(batches: list[BoundBatch]) -> None:
    """Raise where a CUDA graph is recorded that would use this step's scalars at every replay."""
    fixed = any(b.device.type == "cuda" and not b.group["capturable"] for b in batches)
    if fixed and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step is recorded into a CUDA graph only with capturable=True")


def check_states_exist(group: dict[str, Any], rule: Rule, states: States) -> None:
    """Raise where a CUDA graph is recorded that would make states anew at every replay."""
    on_gpu = any(p.device.type == "cuda" for p in group["params"])
    recording = on_gpu and torch.cuda.is_current_stream_capturing()
    if recording and lacks_states(group, rule, states):
        raise RuntimeError(
            "a CUDA graph would make states anew at every replay: take a step before recording one"
        )


def run_step(
    batches: list[BoundBatch], scalars: Scalars, gradient_sums: list[Tensor] | None = None
) -> StepResults:
    """Step every batch. Where a batch is clipped, ``scalars`` already knows the global norm, and
    ``gradient_sums`` are the sums of squares of all gradients before the clip, over all shards."""
    each = [batch.step_scalars(scalars) for batch in batches]
    _set_gradient_sums(batches, each, scalars, gradient_sums)
    sums = _sums_of_shards(batches, each)
    results = []
    for i, (b, given) in enumerate(zip(batches, each, strict=True)):
        if i in sums:
            report = b.backend.apply(b.rule, b.bound, given, sums[i])
        else:
            report = b.backend.step(b.rule, b.bound, given)
        results.append(StepResult(b.batch.weights, b.rule, report))
    mark_written(batches)
    return results


def draw_seed() -> int:
    """A seed of stochastic rounding.

    From torch's own generator: torch.manual_seed makes it reproducible, and a saved generator state
    resumes it.
    """
    return int(torch.randint(2**62, (), device="cpu"))


def mark_written(batches: list[BoundBatch]) -> None:
    """Raise the versions of the weights. Autograd then notices that a saved tensor was overwritten,
    which a write through an address does not tell it."""
    for b in batches:
        written = b.batch.weights
        torch.autograd.graph.increment_version(written)
        for name in b.batch.path:
            written = at_path(written, (name,))
            torch.autograd.graph.increment_version(written)


def _set_gradient_sums(
    batches: list[BoundBatch],
    each: list[StepScalars],
    scalars: Scalars,
    unclipped: list[Tensor] | None,
) -> None:
    """Put sums of squares of gradients into the scalars of sharded batches that normalize them:
    those that the global norm has taken, or else new ones. Of other batches a back end takes them
    itself: from the clipped gradients, as in a step inside torch.compile, for the same bits."""
    sharded = [
        i for i, b in enumerate(batches) if b.rule.normalize_grad and b.batch.rows is not None
    ]
    if unclipped is None:
        measured = [(batches[i].batch.rows, batches[i].gradient_sums(each[i])) for i in sharded]
        found = all_reduce_sums(measured)
    else:
        limits = [batches[i].group["max_grad_norm"] for i in sharded]
        found = [
            scalars.clipped_sums(unclipped[i], limit)
            for i, limit in zip(sharded, limits, strict=True)
        ]
    for i, sums in zip(sharded, found, strict=True):
        each[i] = each[i].with_gradient_sums(sums)


def _sums_of_shards(batches: list[BoundBatch], each: list[StepScalars]) -> dict[int, Tensor]:
    """Sums of squares over all shards, by index in ``batches``, of sharded batches that adapt."""
    indices = [i for i, b in enumerate(batches) if b.batch.rows is not None and b.rule.adapt]
    if not indices:
        return {}
    measured = [(b.batch.rows, b.measure(each[i])) for i, b in ((i, batches[i]) for i in indices)]
    return dict(zip(indices, all_reduce_sums(measured), strict=True))
