"""FsdpEngine: measures shards of FSDP2 during backward, as soon as they are reduced."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastlars.backends.upload import is_capturing
from fastlars.in_backward.arrivals import Arrivals
from fastlars.in_backward.handle import attach
from fastlars.in_backward.pieces import EarlyWork, InFlightPiece, bound_or_none, with_known_sums
from fastlars.in_backward.validation import shared_parameters
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.dtensor import local_tensor, mesh_of, placed_alike, plain_shard
from fastlars.optim.execute import BoundBatch, StepResults
from fastlars.optim.scalars import scalars_for
from fastlars.optim.wrapped import is_plain
from fastlars.rules import Rule


def reduced_together(module: nn.Module) -> dict[Tensor, int]:
    """For each parameter, the number of the FSDP module whose reduce-scatter it is part of: the
    innermost around it."""
    owner: dict[Tensor, int] = {}
    for number, each in enumerate(m for m in module.modules() if isinstance(m, FSDPModule)):
        owner.update(dict.fromkeys(each.parameters(), number))
    return owner


def work_on_shards(rule: Rule, mode: str) -> EarlyWork | None:
    """What is measured of a rule's shards during backward: "clip", the norms of the gradients;
    "measure", the norms of the trust ratios; or nothing."""
    if rule.normalize_grad:
        return "clip"  # the norms of whole gradients come first
    may_measure = rule.adapt and not (rule.measure_writes and mode == "norms")
    return "measure" if may_measure else None


class FsdpEngine(Arrivals):
    """Takes the sums of squares of an FSDP2 module's shards when its reduce-scatter is done.

    What is left to ``optimizer.step()`` is one all-reduce of all sums, and the writes. Its batches,
    its collectives and their order are those of an ordinary step, whatever was measured early: they
    are the same on all ranks.
    """

    looks_for_late_reads = False  # no weight is written during backward

    def __init__(
        self,
        module: nn.Module,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        mode: str,
        debug: bool,
    ) -> None:
        # Shards that FSDP2 offloads to the CPU are not measured early: a copy may be under way.
        here = [p for p in params if _is_on_its_mesh(p)]
        self._owner = reduced_together(module)
        on_device = bool(here) and plain_shard(here[0]).device.type != "cpu"
        steps_all = {p for p in module.parameters() if p.requires_grad} <= set(params)
        self._after_step = AfterStep(module) if steps_all and on_device else None
        super().__init__(optimizer, here, mode, debug)

    def begin(self) -> None:
        super().begin()
        # Of each reduce-scatter, parameters still to arrive. Some may be frozen by now.
        self._missing = Counter(self._owner[p] for p in self._params if p.requires_grad)

    def before_forward(self) -> None:
        if self._after_step is not None and not torch.compiler.is_compiling():
            self._after_step.tell()

    def may_write(self) -> bool:
        advances = type(self.optimizer).rule.measure_writes and any(
            group["adapt"] and not group.get("normalize_grad")
            for group in self.optimizer.param_groups
        )
        return super().may_write() and advances

    def choose_early_work(self) -> EarlyWork | None:
        if is_capturing(plain_shard(self._params[0]).device):
            return None  # a CUDA graph cannot copy where sums lie, as KnownSums does
        if self.planned_rules() is None:
            return None
        return "clip" if self._needs_norm() else "measure"

    def _work_on(self, b: BoundBatch) -> EarlyWork | None:
        if self._early_work == "clip":
            return "clip"
        # Without rows, step() need not wait for other shards.
        return None if b.batch.rows is None else work_on_shards(b.rule, self._mode)

    def is_full(self, p: Tensor) -> bool:
        owner = self._owner[p]
        self._missing[owner] -= 1
        return self._missing[owner] == 0

    def arrived_again(self, p: Tensor) -> None:
        self._stale = True  # gradients add up
        if self._writes:
            raise RuntimeError(
                "a second reduce-scatter before optimizer.step(): overlap has used the gradients "
                "of the first one already. To accumulate gradients, call "
                "set_requires_gradient_sync(False) for all backward passes of a step but the last, "
                'or take mode="norms"'
            )

    def flush(self) -> None:
        # A gradient that is still a sum over ranks, as tensor parallelism leaves some, would be
        # summed here: by a collective that other ranks may not enter now.
        params = [p for p in self._waiting.take() if p.grad is None or placed_alike([p.grad], [p])]
        if self._stale or not params:
            return
        slices = self._slices(params)  # of those that still are in a group
        batches = bound_or_none(slices, self.optimizer) if self._early_work else None
        if batches:
            self._measure(batches)
        if batches or self._writes:  # in the first steps too, which so find changes
            used = [self._members[part.number][i] for part in slices for i in part.indices]
            self._snapshot(used, None)

    def _measure(self, batches: list[BoundBatch]) -> None:
        scalars = scalars_for(b.backend for b in batches)
        for work in ("measure", "clip"):
            chosen = [b for b in batches if self._work_on(b) == work]
            if work == "measure":
                each = [b.step_scalars(scalars, writes=False) for b in chosen]
            else:
                each = [scalars.unclipped(b.sign, b.device) for b in chosen]
            if chosen:
                self._begin_piece(InFlightPiece(chosen, each, work))

    def raise_cut_off(self) -> None:
        raise RuntimeError(
            "backward ended in an error after overlap had advanced some moments: go on from a "
            "checkpoint"
        )

    def step_rest(self) -> StepResults | None:
        optimizer, in_flight = self.optimizer, self.in_flight
        if self._stale or not in_flight:
            return optimizer.step_batches(optimizer.bind_groups)
        stream = _current_stream(self._params[0])
        for sums in (sums for piece in in_flight for sums in piece.results):
            if stream is not None and sums is not None:
                sums.record_stream(stream)  # made on the stream of the reduce-scatter

        def bind() -> list[BoundBatch]:
            batches = optimizer.bind_groups()
            if self._writes:
                # The others of a batch whose moments were advanced in part: all of them, or none,
                # are measured in step().
                begun = set(self._covered())
                waiting = (b for b in batches if self._work_on(b) == "measure")
                if any(p not in begun for b in waiting for p in b.batch.weights):
                    self._measure(self._bind_rest())
            return with_known_sums(batches, in_flight)

        return optimizer.step_batches(bind)

    def finish(self) -> StepResults | None:
        results = super().finish()
        if self._after_step is not None:
            self._after_step.note()
        return results

    def close(self) -> None:
        super().close()
        self._after_step = None
        self._owner.clear()


class AfterStep:
    """Lets the next all-gathers wait for the step alone, instead of all that was queued after it.

    FSDP2 takes an event for that. It would not wait for what is written later, as by a checkpoint
    that is loaded, or by another optimizer: where a weight was written since the step, FSDP2 waits
    as it does by itself. So it does where shards are tensor subclasses, of which an all-gather may
    read more than weights (scales of float8, computed after the step).
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._event: Any = None
        self._versions: list[int] = []

    def note(self) -> None:
        """After a step: everything up to here has to be done before weights are gathered."""
        params = list(self._module.parameters())
        stream = _current_stream(params[0])
        plain = all(is_plain(local_tensor(p)) for p in params)
        waits = stream is not None and plain and not is_capturing(plain_shard(params[0]).device)
        self._event = stream.record_event() if waits else None
        self._versions = _versions(params)

    def tell(self) -> None:
        """Before a forward pass: tell FSDP2, unless a weight was written since."""
        event, self._event = self._event, None
        # Only the root's next forward pass uses the event up. Elsewhere it would be left for one
        # that comes after a later step.
        if event is None or not self._module._get_fsdp_state()._is_root:
            return
        if self._versions == _versions(list(self._module.parameters())):
            self._module.set_post_optim_event(event)


def _versions(params: list[Tensor]) -> list[int]:
    """A write to a DTensor raises its own version alone, one to its shard the shard's."""
    return [t._version for t in params] + [plain_shard(t)._version for t in params]


def _is_on_its_mesh(p: Tensor) -> bool:
    mesh = mesh_of(p)
    return mesh is not None and plain_shard(p).device.type == mesh.device_type


def _current_stream(p: Tensor) -> Any:
    device = plain_shard(p).device
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def overlap_fsdp(module: Any, optimizer: FusedOptimizer, mode: str, debug: bool) -> FsdpEngine:
    """See ``fastlars.distributed.overlap``."""
    optimizer, params = shared_parameters(optimizer, module, "overlap")
    engine = FsdpEngine(module, optimizer, params, mode, debug)
    attach(engine, module)
    return engine
