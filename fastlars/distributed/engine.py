"""The overlap itself: what happens to a bucket, at the end of backward, and in step()."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from fastlars.backends.base import Mismatch
from fastlars.distributed.averaging import BucketAverager, Future, compress, first_value
from fastlars.distributed.buckets import Bucket, EarlyWork, InFlightBucket, with_known_sums
from fastlars.distributed.late_reads import LateReads
from fastlars.distributed.snapshots import OptionsSnapshot, TensorSnapshot, same_param_lists
from fastlars.distributed.validation import check_groups, has_scaler, raise_changed, raise_scaler
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.execute import BoundBatch, StepResults
from fastlars.optim.planner import GroupSlice, slices_of

# The first steps with a backward pass, in which overlap also runs checks that would be too slow for
# every step. The first two are not overlapped: what they find is refused with nothing changed.
WATCHED_STEPS = 10
UNTOUCHED_STEPS = 2


class Engine:
    """Overlaps the steps of one optimizer with the backward passes of one DDP module.

    What is done with a bucket before ``optimizer.step()`` is chosen when the first bucket of a step
    arrives: "step" (it is stepped once it is reduced), "measure" (its sums of squares are taken),
    "clip" (those of its gradients alone are taken, for the global norm), or None: everything is
    left to ``optimizer.step()``.

    Only "step" writes during backward. A program that may write during backward is checked in every
    step, also in steps that write nothing early, so that an error does not depend on the step.
    "measure" and "clip" write nothing before ``step()``, which ignores the early sums where
    gradients have changed since.
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
        self.optimizer = optimizer
        self.release: Callable[[], None] = lambda: None
        self.leaving = False
        self._averager = averager
        self._dtype = dtype
        self._mode = mode
        self._debug = debug
        self._buckets: dict[int, Bucket] = {}
        self._rest: dict[int, GroupSlice] = {}  # by group: parameters that no bucket had
        self._members: list[list[Tensor]] = []
        # Parameters that no bucket may step: those that a static graph does not use, for which DDP
        # leaves zeros in the buckets, and those that backward reads late.
        self._left_out: set[Tensor] = set()
        self._early_sums_unused = False  # the last step could not use its early sums
        self._gradients_used = False  # by a step that was then refused
        self._wrote = False  # whether the last forward pass was of a step that may write
        self._watched = 0  # steps with a backward pass so far, up to WATCHED_STEPS
        self.reads: LateReads | None = LateReads(ddp.parameters())
        # Not as a decorator: it imports torch._dynamo, as DDP does when one is made.
        self.step = torch.compiler.disable(self._finish)
        self._reset()

    def _reset(self) -> None:
        self._begun = False  # the first bucket has arrived
        self._reduced = False  # a whole backward pass has ended
        self._refused = False  # a second backward pass
        self._stale = False  # the early sums are not of the gradients that there are now
        self._writes = False  # this step may write during backward
        self._early_work: EarlyWork | None = None
        self._options: OptionsSnapshot | None = None  # at the first bucket
        self._snapshot: TensorSnapshot | None = None  # at the end of backward
        self._slices: list[GroupSlice] = []  # of the buckets of this backward pass
        self.in_flight: list[InFlightBucket] = []
        if self.reads is not None:
            self.reads.forget()

    def watch(self, outputs: Any) -> None:
        """Look for late reads in the backward pass of these outputs of the module."""
        writes = self.may_write()
        if writes and not self._wrote and self._watched:
            # From here on buckets are stepped early: look again, as at the beginning.
            self._watched = 0
            self.reads = self.reads or LateReads(self.ddp.parameters())
        self._wrote = writes
        if self.reads is not None and writes:
            self.reads.watch(outputs)

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
        if self._reduced and self._writes:
            return self._refuse(bucket)
        # Outside backward, a process whose inputs have ended (Join) reduces for the others, and has
        # nothing to step.
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._begun:
            self._begin()
        self._stale = self._stale or self._reduced  # a second backward pass: gradients add up
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

    def _begin(self) -> None:
        """At the first bucket of a step: compare with everything that may have changed since."""
        self._begun, self._gradients_used = True, False
        self._options = OptionsSnapshot(self.optimizer)
        if not same_param_lists(self._members, self._options.members):
            # Slices know parameters by their index in their group.
            self._members = self._options.members
            self._buckets.clear()
            self._rest.clear()
        self._writes = self.may_write()
        self._early_work = self._choose_early_work()

    def may_write(self) -> bool:
        """Whether steps of this program write during backward, even if this step does not."""
        return self._mode == "step" and not self._needs_norm()

    def _needs_norm(self) -> bool:
        return bool(self.optimizer.stepper.needs_norm(self.optimizer.param_groups))

    def _choose_early_work(self) -> EarlyWork | None:
        optimizer = self.optimizer
        # The first two steps of a program are left to optimizer.step(). The first one makes states
        # and plans, with all their checks, and shows whether there is a GradScaler; DDP has only
        # one bucket then anyway. The second one shows whether some backward passes are not followed
        # by a step, as of the other network of a GAN. A step without a backward pass, which
        # torch.distributed.checkpoint takes, shows nothing, and is not counted.
        if self._watched < UNTOUCHED_STEPS or self._early_sums_unused:
            return None
        try:
            check_groups(optimizer)
            rules = optimizer.planner.current_rules(optimizer.param_groups, optimizer.state)
        except (RuntimeError, TypeError, ValueError):
            return None  # step() raises the same, before anything is written
        if rules is None:
            return None
        if self._needs_norm():
            return "clip"
        if self._mode == "step":
            return "step"
        return "measure" if any(r.adapt and not r.measure_writes for r in rules) else None

    def _bucket(self, bucket: GradBucket) -> Bucket:
        kept = self._buckets.get(bucket.index())
        if kept is None or not kept.fits(bucket):
            kept = Bucket.of(bucket, self.optimizer, self._dtype, self._left_out)
            self._buckets[bucket.index()] = kept
        return kept

    def _start(self, kept: Bucket) -> InFlightBucket | None:
        self._slices += kept.slices
        batches = None
        if self._early_work is not None and not self._stale:
            batches = kept.bind_slices(self.optimizer)
        if not batches:
            return None
        in_flight = InFlightBucket.of(batches, for_norm=self._early_work == "clip")
        self.in_flight.append(in_flight)
        return in_flight

    def on_reduced(self, in_flight: InFlightBucket, future: Future[list[Tensor]]) -> list[Tensor]:
        """Runs when a bucket is reduced, in the thread that waited for it. Returns the result
        tensors: on CUDA, to wait for a future only waits for the streams of tensors in its value.
        """
        future.value()  # raises the reduction's error, if it had one
        torch.get_num_threads()  # gives a new thread torch's number of threads
        with torch.no_grad():
            in_flight.work_early(self._early_work)
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
        self._reduced = True
        self.wait()
        # DDP's own callback comes next, and writes gradients.
        Variable._execution_engine.queue_callback(self._take_snapshot)

    def wait(self) -> None:
        """Wait until the early work of every bucket is done; raise what went wrong in it."""
        for in_flight in self.in_flight:
            if in_flight.future is not None:
                in_flight.future.wait()

    def _covered(self) -> list[Tensor]:
        return [p for in_flight in self.in_flight for p in in_flight.params()]

    def _take_snapshot(self) -> None:
        """Note parameters, gradients and states at the end of backward."""
        params = [self._members[part.number][i] for part in self._slices for i in part.indices]
        reduced = [gradient for part in self._slices for gradient in part.grads]
        every = self.optimizer.state
        held = [every.get(p, {}).values() for p in params] if self._early_work else []
        states = [value for values in held for value in values if isinstance(value, Tensor)]
        exact = self._debug or self._watched < WATCHED_STEPS
        self._snapshot = TensorSnapshot(params, None if self._dtype else reduced, states, exact)

    def is_under_way(self) -> bool:
        """Whether a step has begun that ``optimizer.step()`` is to finish."""
        return bool(self.in_flight) and self._reduced

    def close(self) -> None:
        """Remove the hooks on parameters, and drop the references that would keep the DDP module
        alive until Python collects cycles."""
        if self.reads is not None:
            self.reads.close()
        self.release = lambda: None
        del self.step, self.ddp

    def _is_cut_off(self) -> bool:
        """Whether a backward pass has begun, and has not reached its end."""
        return bool(self.in_flight) and not self._reduced

    def _what_changed(self) -> str | None:
        """What was changed after overlap had used it, if anything: "gradient", "weight", ..."""
        optimizer = self.optimizer
        changed = self._snapshot.changed() if self._snapshot is not None else None
        if changed is None and self._options is not None:
            changed = self._options.changed(optimizer)
        if changed is None and self._early_work and not optimizer.planner.holds(optimizer.state):
            changed = "state"
        return changed

    def _finish(self) -> StepResults | None:
        """The rest of the step, which ``optimizer.step()`` asks for. Returns what it
        reports of every batch, or None where the step was skipped."""
        used = self._gradients_used
        # Until the step has ended well: after any error the gradients are used up.
        self._gradients_used = used or (self._writes and bool(self.in_flight))
        try:
            check_groups(self.optimizer)
            self.wait()
            if used and any(p.grad is not None for group in self._members for p in group):
                raise RuntimeError(
                    "gradients were used already, by a step that overlap then refused: go on with "
                    "zero_grad() and a backward pass, from a checkpoint"
                )
            writes = self._writes if self._begun else self.may_write()
            if writes:
                self._check()
            else:
                # Nothing was written yet.
                changed = self._what_changed() is not None or self._is_cut_off()
                self._stale = self._stale or changed or has_scaler(self.optimizer)
                self._early_sums_unused = self._stale
            results = self._step()
            self._gradients_used = False
            if self._reduced:
                self._update_watch()
            return results
        finally:
            self._reset()
            if self.leaving:
                self.release()

    def _check(self) -> None:
        """Raise where buckets were stepped, or in later steps would be, with values that have
        changed since."""
        if has_scaler(self.optimizer):
            raise_scaler(self.optimizer)
        if self._is_cut_off():
            raise RuntimeError(
                "backward ended in an error, or did not reach all parameters of the DDP module, "
                "after overlap had stepped some of them: go on from a checkpoint. Parameters that "
                "are unused in some steps do not go with overlap"
            )
        if self._refused:
            raise RuntimeError(
                "gradients hold a second backward pass, which overlap refused: go on with "
                "zero_grad() and a backward pass"
            )
        changed = self._what_changed()
        if changed is not None:
            raise_changed(changed)
        late = self.reads.late.intersection(self._covered()) if self.reads is not None else set()
        if late:
            self._left_out |= late
            self._buckets.clear()
            shapes = sorted(str(tuple(p.shape)) for p in late)
            raise RuntimeError(
                f"backward has read weights that overlap had stepped already, of shape "
                f"{', '.join(shapes)}: gradients may be wrong. From now on, optimizer.step() steps "
                "these weights: go on from a checkpoint"
            )

    def _update_watch(self) -> None:
        """After a step with a backward pass: note which parameters later buckets must not step, and
        end the watch after :data:`WATCHED_STEPS`."""
        self._watched = min(self._watched + 1, WATCHED_STEPS)
        reads = self.reads
        if reads is None:
            return
        left_out = set(reads.late)
        if self.ddp.static_graph and self._watched == 1:
            # In a static graph, what has no gradient now will never have one.
            left_out |= {p for p in self.ddp.parameters() if p not in reads.arrived}
        if not left_out <= self._left_out:
            self._left_out |= left_out
            self._buckets.clear()
        if self._watched == WATCHED_STEPS and not self._debug:
            reads.close()
            self.reads = None

    def _step(self) -> StepResults | None:
        optimizer, in_flight = self.optimizer, self.in_flight
        if self._stale or not in_flight:
            return optimizer.step_batches(optimizer.bind_groups)
        if self._early_work == "clip":
            bind = optimizer.bind_groups
            return optimizer.step_batches(lambda: with_known_sums(bind(), in_flight))
        # The rest first: binding it can still raise, while buckets were bound and checked before.
        rest = optimizer.step_batches(self._bind_rest)
        assert rest is not None  # only the global norm skips steps here, and no group needs it
        early = [pair for each in in_flight for pair in each.finish(self._early_work)]
        return early + rest

    def _bind_rest(self) -> list[BoundBatch]:
        """The batches of parameters that no bucket had."""
        optimizer = self.optimizer
        planner, groups, states = optimizer.planner, optimizer.param_groups, optimizer.state
        covered = set(self._covered())
        params = [p for group in groups for p in group["params"]]
        grads = {p: p.grad for p in params if p.grad is not None and p not in covered}
        batches = []
        for part in slices_of(groups, grads):
            part.reuse_plan_of(self._rest.get(part.number))
            try:
                batches += planner.bind_slice(part, groups, states)
            except (Mismatch, KeyError):
                planner.replan(part.number, groups, states)
                batches += planner.bind_slice(part, groups, states)
            self._rest[part.number] = part
        return batches
