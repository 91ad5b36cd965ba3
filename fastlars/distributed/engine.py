"""DdpEngine: steps the buckets of a DDP module, one while the next ones are reduced."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from fastlars.distributed.averaging import BucketAverager, Future, compress, first_value
from fastlars.distributed.buckets import Bucket
from fastlars.distributed.validation import check_groups, check_join
from fastlars.in_backward.engine import Engine
from fastlars.in_backward.pieces import EarlyWork, InFlightPiece, bound_or_none
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.planner import GroupSlice
from fastlars.optim.scalars import scalars_for


class DdpEngine(Engine):
    """Overlaps the steps of one optimizer with the backward passes of one DDP module.

    The first two steps of a program are left to ``optimizer.step()``. The first one makes states
    and plans, with all their checks, and shows whether there is a GradScaler; DDP has only one
    bucket then anyway. The second one shows whether some backward passes are not followed by a
    step, as of the other network of a GAN. A step without a backward pass, which
    torch.distributed.checkpoint takes, shows nothing, and is not counted.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        optimizer: FusedOptimizer,
        averager: BucketAverager,
        dtype: torch.dtype | None,
        mode: str,
        debug: bool,
    ) -> None:
        self.ddp = ddp
        self._averager = averager
        self._dtype = dtype
        self._buckets: dict[int, Bucket] = {}
        super().__init__(optimizer, list(ddp.parameters()), mode, debug)

    def reset(self) -> None:
        super().reset()
        self._refused = False  # a second backward pass
        self._slices: list[GroupSlice] = []  # of the buckets of this backward pass

    def check_options(self) -> None:
        check_groups(self.optimizer)

    def before_forward(self) -> None:
        check_join(self.ddp)

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """DDP's hook: average the bucket, and step it where that can be done now."""
        if self.reads is None:
            return self._reduce(bucket)
        self.reads.paused = True
        try:
            return self._reduce(bucket)
        finally:
            self.reads.paused = False

    def _reduce(self, bucket: GradBucket) -> Future[Tensor]:
        buffer = bucket.buffer()
        if self._ended and self._writes:
            return self._refuse(bucket)
        # Outside backward, a process whose inputs have ended (Join) reduces for the others, and has
        # nothing to step.
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._begun:
            self.begin()
        self._stale = self._stale or self._ended  # a second backward pass: gradients add up
        kept = self._bucket(bucket) if buffer.layout == torch.strided else None
        in_flight = self._start(kept) if in_backward and kept is not None else None
        if in_backward and bucket.is_last():
            # With the last bucket: nested backward passes, as of activation checkpointing, would
            # run a callback that was queued earlier too early.
            Variable._execution_engine.queue_callback(self._end_of_backward)
        if kept is None or kept.reduced is buffer:
            future = self._averager.start(self._averager.scale(buffer, bucket))
            result = future.then(first_value)
        else:
            future = self._averager.start(compress(buffer, self._averager.size, kept.reduced))
            if in_flight is not None and self._early_work == "step" and kept.steps_all():
                result = future.then(lambda _: buffer)
            else:
                result = future.then(lambda f: buffer.copy_(first_value(f)))
        if in_flight is not None:
            # After DDP's own callback, which backward waits for. On CUDA, futures run this on a
            # stream of their own that waits for the reduction.
            in_flight.future = future.then(partial(self.on_reduced, in_flight))
        return result

    def forget_pieces(self) -> None:
        self._buckets.clear()

    def choose_early_work(self) -> EarlyWork | None:
        rules = self.planned_rules()
        if rules is None:
            return None
        if self._needs_norm():
            return "clip"
        if self._mode == "step":
            return "step"
        # step() may measure again, and would draw other seeds than those that were drawn early.
        if any(group["stochastic_rounding"] for group in self.optimizer.param_groups):
            return None
        return "measure" if any(r.adapt and not r.measure_writes for r in rules) else None

    def _bucket(self, bucket: GradBucket) -> Bucket:
        kept = self._buckets.get(bucket.index())
        if kept is None or not kept.fits(bucket):
            kept = Bucket.of(bucket, self.optimizer, self._dtype, self._left_out)
            self._buckets[bucket.index()] = kept
        return kept

    def _start(self, kept: Bucket) -> InFlightPiece | None:
        self._slices += kept.slices
        work, batches = self._early_work, None
        if work is not None and not self._stale:
            batches = bound_or_none(kept.slices, self.optimizer)
        if work is None or not batches:
            return None
        scalars = scalars_for(b.backend for b in batches)
        if work == "clip":  # no learning rate is read
            each = [scalars.unclipped(b.sign, b.device) for b in batches]
        else:
            each = [b.step_scalars(scalars) for b in self._rounding.prepare(batches)]
        in_flight = InFlightPiece(batches, each, work)
        self.in_flight.append(in_flight)
        return in_flight

    def on_reduced(self, in_flight: InFlightPiece, future: Future[list[Tensor]]) -> list[Tensor]:
        """Runs when a bucket is reduced, in the thread that waited for it. Returns the result
        tensors: on CUDA, to wait for a future only waits for the streams of tensors in its value.
        """
        future.value()  # raises the reduction's error, if it had one
        torch.get_num_threads()  # gives a new thread torch's number of threads
        with torch.no_grad():
            in_flight.work_early()
        return [result for result in in_flight.results if result is not None]

    def _refuse(self, bucket: GradBucket) -> Future[Tensor]:
        """Let a second backward pass end as usual, and raise then, so that DDP stays usable."""
        buffer = bucket.buffer()
        self._refused = True
        if bucket.is_last():
            # After DDP's own callback, which it queues after its last bucket.
            engine = Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self._raise_second))
        done: Future[Tensor] = Future(devices=None if buffer.is_cpu else [buffer.device])
        done.set_result(buffer)
        return done

    @staticmethod
    def _raise_second() -> None:
        raise RuntimeError(
            "a second backward pass before optimizer.step(): overlap has used the gradients of the "
            "first one already. To accumulate gradients, run all backward passes of a step but the "
            'last under no_sync(), or take mode="norms"'
        )

    def _end_of_backward(self) -> None:
        """Wait until no bucket is in flight when backward returns; on CUDA, the stream waits."""
        self._ended = True
        self.wait()
        # DDP's own callback comes next, and writes gradients.
        Variable._execution_engine.queue_callback(self._take_snapshot)

    def _take_snapshot(self) -> None:
        """Note parameters, gradients and states at the end of backward."""
        params = [self._members[part.number][i] for part in self._slices for i in part.indices]
        reduced = [gradient for part in self._slices for gradient in part.grads]
        self._snapshot(params, None if self._dtype else reduced)

    def close(self) -> None:
        super().close()
        del self.ddp

    def raise_cut_off(self) -> None:
        raise RuntimeError(
            "backward ended in an error, or did not reach all parameters of the DDP module, "
            "after overlap had stepped some of them: go on from a checkpoint. Parameters that "
            "are unused in some steps do not go with overlap"
        )

    def check_step(self) -> None:
        if self._refused:
            raise RuntimeError(
                "gradients hold a second backward pass, which overlap refused: go on with "
                "zero_grad() and a backward pass"
            )
        super().check_step()

    def update_watch(self) -> None:
        reads = self.reads
        if reads is not None and self.ddp.static_graph and self._watched == 0:
            # In a static graph, what has no gradient now will never have one.
            self._leave_out({p for p in self.ddp.parameters() if p not in reads.arrived})
        super().update_watch()
