"""FsdpEngine: measures shards of FSDP2 during backward, as soon as they are reduced."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastlars.in_backward.arrivals import Arrivals
from fastlars.in_backward.handle import attach
from fastlars.in_backward.pieces import EarlyWork, InFlightPiece, bound_or_none, with_known_sums
from fastlars.in_backward.validation import shared_parameters
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.dtensor import mesh_of, plain_shard
from fastlars.optim.execute import BoundBatch, StepResults
from fastlars.optim.scalars import scalars_for


def reduced_together(module: nn.Module) -> dict[Tensor, int]:
    """For each parameter, the number of the FSDP module whose reduce-scatter it is part of: the
    innermost around it."""
    owner: dict[Tensor, int] = {}
    for number, each in enumerate(m for m in module.modules() if isinstance(m, FSDPModule)):
        owner.update(dict.fromkeys(each.parameters(), number))
    return owner


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
        self._module = module
        # Shards that FSDP2 offloads to the CPU are not measured early: a copy may be under way.
        here = [p for p in params if _is_on_its_mesh(p)]
        self._owner = reduced_together(module)
        self._sizes = Counter(self._owner[p] for p in here)
        steps_all = {p for p in module.parameters() if p.requires_grad} <= set(params)
        on_device = bool(here) and plain_shard(here[0]).device.type != "cpu"
        self._after_step = AfterStep() if steps_all and on_device else None
        super().__init__(optimizer, here, mode, debug)

    def reset(self) -> None:
        super().reset()
        self._missing = Counter(self._sizes)  # of each FSDP module, parameters still to arrive

    def check_options(self) -> None:
        pass

    def before_forward(self) -> None:
        if self._after_step is not None:
            self._after_step.tell(self._module, self._params)

    def may_write(self) -> bool:
        advances = type(self.optimizer).rule.measure_writes and any(
            group["adapt"] and not group.get("normalize_grad") for group in self._groups()
        )
        return super().may_write() and advances

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def choose_early_work(self) -> EarlyWork | None:
        if self._watched < self.untouched_steps or self._early_sums_unused:
            return None
        try:
            rules = self.optimizer.planner.current_rules(self._groups(), self.optimizer.state)
        except (RuntimeError, TypeError, ValueError):
            return None  # step() raises the same, before anything is written
        if rules is None:
            return None
        return "clip" if self._needs_norm() else "measure"

    def _work_on(self, b: BoundBatch) -> EarlyWork | None:
        if self._early_work == "clip":
            return "clip"
        if b.batch.rows is None:
            return None  # step() need not wait for other shards
        if b.rule.normalize_grad:
            return "clip"  # the norms of whole gradients come first
        may_measure = b.rule.adapt and not (b.rule.measure_writes and self._mode == "norms")
        return "measure" if may_measure else None

    def is_full(self, p: Tensor) -> bool:
        owner = self._owner[p]
        self._missing[owner] -= 1
        return self._missing[owner] == 0

    def arrived_again(self, p: Tensor) -> None:
        self._stale = True  # gradients add up
        if self._writes and p in set(self._covered()):
            raise RuntimeError(
                "a second reduce-scatter before optimizer.step(): overlap has used the gradients "
                "of the first one already. To accumulate gradients, call "
                "set_requires_gradient_sync(False) for all backward passes of a step but the last, "
                'or take mode="norms"'
            )

    def flush(self) -> None:
        params = self._waiting.take()
        if self._early_work is None or self._stale:
            return
        if batches := bound_or_none(self._slices(params), self.optimizer):
            self._measure(batches)
            self._snapshot(params, None)

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
        if self._writes:
            # Parameters that were not measured: those of a batch are measured all, or none.
            self._measure(self._bind_rest())
        stream = _current_stream(self._params[0])
        for sums in (sums for piece in in_flight for sums in piece.results):
            if stream is not None and sums is not None:
                sums.record_stream(stream)  # made on the stream of the reduce-scatter
        return optimizer.step_batches(lambda: with_known_sums(optimizer.bind_groups(), in_flight))

    def finish(self) -> StepResults | None:
        results = super().finish()
        if self._after_step is not None:
            self._after_step.note(self._params)
        return results

    def close(self) -> None:
        super().close()
        del self._module


class AfterStep:
    """Lets the next all-gathers wait for the step alone, instead of all that was queued after it.

    FSDP2 takes an event for that. It would not wait for what writes weights later, as a checkpoint
    that is loaded: where a weight was written since the step, FSDP2 waits as it does by itself.
    """

    def __init__(self) -> None:
        self._event: Any = None
        self._versions: list[int] = []

    def note(self, params: list[Tensor]) -> None:
        """After a step: everything up to here has to be done before weights are gathered."""
        stream = _current_stream(params[0])
        self._event = None if stream is None else stream.record_event()
        self._versions = [plain_shard(p)._version for p in params]

    def tell(self, module: Any, params: list[Tensor]) -> None:
        """Before a forward pass: tell FSDP2, unless a weight was written since."""
        event, self._event = self._event, None
        if event is not None and self._versions == [plain_shard(p)._version for p in params]:
            module.set_post_optim_event(event)


def _is_on_its_mesh(p: Tensor) -> bool:
    mesh = mesh_of(p)
    return mesh is not None and plain_shard(p).device.type == mesh.device_type


def _current_stream(p: Tensor) -> Any:
    device = plain_shard(p).device
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def overlap_fsdp(module: Any, optimizer: FusedOptimizer, mode: str, debug: bool) -> FsdpEngine:
    """See :func:`fastlars.distributed.overlap`."""
    optimizer, params = shared_parameters(optimizer, module, "overlap")
    engine = FsdpEngine(module, optimizer, params, mode, debug)
    attach(engine, module)
    return engine
