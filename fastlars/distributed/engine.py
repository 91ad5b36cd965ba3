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
from fastlars.distributed.average import Average, Future, compress, first_value
from fastlars.distributed.buckets import Bucket, Part, Started, measured, parts_of
from fastlars.distributed.reads import LateReads
from fastlars.distributed.refusals import check_groups, has_scaler, raise_changed, raise_scaler
from fastlars.distributed.watch import Options, Snapshot, same_members
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.numbers import numbers
from fastlars.optim.work import Taken, Work, check_recording

# Steps with a backward pass in which overlap also looks for what costs too much to look for in
# every step. The first ones are not overlapped: what they find is refused with nothing changed.
WATCHED_STEPS = 10
UNTOUCHED_STEPS = 2


class Engine:
    """Overlaps the steps of one optimizer with the backward passes of one DDP module.

    A step is of one of these kinds, chosen when its first bucket arrives: "step" (a bucket is
    stepped when it is reduced), "measure" (its sums of squares are taken then), "clip" (the
    gradients' alone, for the global norm), or None: all is left to ``optimizer.step()``.

    Only "step" writes during backward. What does not go with that is refused in every step of a
    program, whatever the step's kind. The other kinds write nothing before ``step()``, which
    starts over where their sums no longer hold.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        optimizer: FusedOptimizer,
        average: Average,
        dtype: torch.dtype | None,
        mode: str,
        debug: bool,
    ) -> None:
        self.ddp = ddp
        self.optimizer = optimizer
        self.release: Callable[[], None] = lambda: None
        self.leaving = False
        self._average = average
        self._dtype = dtype
        self._mode = mode
        self._debug = debug
        self._buckets: dict[int, Bucket] = {}
        self._rest: dict[int, Part] = {}
        self._members: list[list[Tensor]] = []
        # Parameters that no bucket may step: unused ones of a static graph, for which DDP leaves
        # zeros in the buckets, and those that backward reads late.
        self._left_out: set[Tensor] = set()
        self._in_vain = False  # what the last step had measured was stale, as with a GradScaler
        self._spent = False  # a step was refused after its gradients were used
        self._wrote = False  # whether the last forward pass was of a step that may write
        self._watched = 0  # steps with a backward pass so far, up to WATCHED_STEPS
        self.reads: LateReads | None = LateReads(ddp.parameters())
        # Not as a decorator: it imports torch._dynamo, as DDP does when one is made.
        self.step = torch.compiler.disable(self._finish)
        self._rearm()

    def _rearm(self) -> None:
        self._arrived = False  # the first bucket
        self._reduced = False  # a whole backward pass
        self._refused = False
        self._stale = False  # what was measured is not of the gradients that there are now
        self._writes = False
        self._kind: str | None = None
        self._options: Options | None = None
        self._seen: Snapshot | None = None
        self._parts: list[Part] = []  # of the buckets of this backward pass
        self.started: list[Started] = []
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
        if in_backward and not self._arrived:
            self._begin()
        self._stale = self._stale or self._reduced  # a second backward pass: gradients add up
        kept = self._bucket(bucket) if buffer.layout == torch.strided else None
        started = self._start(kept) if in_backward and kept is not None else None
        if in_backward and bucket.is_last():
            # Not with the first one: backward passes within this one (checkpoints) end earlier.
            Variable._execution_engine.queue_callback(self._end_of_backward)
        if kept is None or kept.reduced is buffer:
            future = self._average.start(self._average.scale(buffer, bucket))
            result = future.then(first_value)
        else:
            future = self._average.start(compress(buffer, self._average.size, kept.reduced))
            if started is not None and self._kind == "step" and kept.covers_all():
                result = future.then(lambda _: buffer)
            else:
                result = future.then(lambda f: buffer.copy_(first_value(f)))
        if started is not None:
            # After DDP's own, which backward waits for. On CUDA, futures run this on a stream of
            # its own that waits for the reduction.
            started.future = future.then(partial(self._take, started))
        return result

    def _begin(self) -> None:
        """The first bucket of a step: look again at everything that may have changed."""
        self._arrived, self._spent = True, False
        self._options = Options(self.optimizer)
        if not same_members(self._members, self._options.members):
            # Parts know parameters by their place in their group.
            self._members = self._options.members
            self._buckets.clear()
            self._rest.clear()
        self._writes = self.may_write()
        self._kind = self._choose()

    def may_write(self) -> bool:
        """Whether steps of this program write during backward, even if this step does not."""
        return self._mode == "step" and not self.optimizer._needs_norm()

    def _choose(self) -> str | None:
        optimizer = self.optimizer
        groups, plans = optimizer.param_groups, optimizer._plans
        # The first two steps of a program are left to optimizer.step(). The first makes states and
        # plans, with all their checks, and shows a GradScaler; DDP has but one bucket then anyway.
        # The second shows a backward pass that no step follows, as of a GAN's other network. A step
        # without a backward pass, which torch.distributed.checkpoint takes, shows nothing.
        if self._watched < UNTOUCHED_STEPS or self._in_vain or len(plans) != len(groups):
            return None
        try:
            check_groups(optimizer)
            rules = [optimizer._rule(number, group) for number, group in enumerate(groups)]
        except (RuntimeError, TypeError, ValueError):
            return None  # step() meets the same, before anything is written
        planned = [plan.params if plan is not None else [] for plan in plans]
        if not (same_members(self._members, planned) and optimizer._states_are_planned()):
            return None
        if optimizer._needs_norm():
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

    def _start(self, kept: Bucket) -> Started | None:
        self._parts += kept.parts
        works = None
        if self._kind is not None and not self._stale:
            works = kept.works(self.optimizer)
        if not works:
            return None
        started = Started.of(works, for_norm=self._kind == "clip")
        self.started.append(started)
        return started

    def _take(self, started: Started, future: Future[list[Tensor]]) -> list[Tensor]:
        """Runs when a bucket is reduced, in the thread that waited for it. Returns the results,
        because on CUDA waiting for a future waits only for the streams of the tensors in its value.
        """
        future.value()  # raises what the reduction did
        torch.get_num_threads()  # which hands torch's number of threads to a new thread
        with torch.no_grad():
            started.take(self._kind)
        return [result for result in started.results if result is not None]

    def _refuse(self, bucket: GradBucket) -> Future[Tensor]:
        """Let this backward pass end as any, and then raise: DDP stays usable."""
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
        """Nothing is under way when backward returns; on CUDA, for the current stream."""
        self._reduced = True
        self.wait()
        # DDP's own callback comes next, and writes gradients.
        Variable._execution_engine.queue_callback(self._look)

    def wait(self) -> None:
        """Until every bucket is stepped; raises what went wrong."""
        for started in self.started:
            if started.future is not None:
                started.future.wait()

    def _covered(self) -> list[Tensor]:
        return [p for started in self.started for p in started.params()]

    def _look(self) -> None:
        """Note what there is at the end of backward."""
        params = [self._members[part.number][i] for part in self._parts for i in part.indices]
        reduced = [gradient for part in self._parts for gradient in part.grads]
        held = [self.optimizer.state.get(p, {}).values() for p in params] if self._kind else []
        states = [value for values in held for value in values if isinstance(value, Tensor)]
        exact = self._debug or self._watched < WATCHED_STEPS
        self._seen = Snapshot(params, None if self._dtype else reduced, states, exact)

    def is_under_way(self) -> bool:
        """Whether a step has begun that ``optimizer.step()`` is to finish."""
        return bool(self.started) and self._reduced

    def close(self) -> None:
        """Leave parameters alone, and drop what would keep the DDP module alive until Python
        collects cycles."""
        if self.reads is not None:
            self.reads.close()
        self.release = lambda: None
        del self.step, self.ddp

    def _is_cut_off(self) -> bool:
        """Whether a backward pass has begun, and has not reached its end."""
        return bool(self.started) and not self._reduced

    def _what_changed(self) -> str | None:
        """What overlap has used and is not what there is now, if anything."""
        changed = self._seen.changed() if self._seen is not None else None
        if changed is None and self._options is not None:
            changed = self._options.changed(self.optimizer)
        if changed is None and self._kind and not self.optimizer._states_are_planned():
            changed = "state"
        return changed

    def _finish(self) -> Taken | None:
        """What ``optimizer.step()`` has left to do; parameters and their trust ratios, or None
        where the step was skipped."""
        used = self._spent
        # Until the step has ended well: after any error the gradients are used up.
        self._spent = used or (self._writes and bool(self.started))
        try:
            check_groups(self.optimizer)
            self.wait()
            if used and any(p.grad is not None for group in self._members for p in group):
                raise RuntimeError(
                    "gradients were used already, by a step that overlap then refused: go on with "
                    "zero_grad() and a backward pass, from a checkpoint"
                )
            if self._writes if self._arrived else self.may_write():
                self._check()
            else:
                # Nothing was written yet.
                changed = self._what_changed() is not None or self._is_cut_off()
                self._stale = self._stale or changed or has_scaler(self.optimizer)
                self._in_vain = self._stale
            taken = self._step()
            self._spent = False
            if self._reduced:
                self._learn()
            return taken
        finally:
            self._rearm()
            if self.leaving:
                self.release()

    def _check(self) -> None:
        """Raise where buckets were stepped, or will be in later steps, with other values."""
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

    def _learn(self) -> None:
        """After a step with a backward pass: what later ones have to know."""
        self._watched = min(self._watched + 1, WATCHED_STEPS)
        reads = self.reads
        if reads is None:
            return
        left_out = set(reads.late)
        if self.ddp.static_graph and self._watched == 1:
            # What gets no gradient now never will.
            left_out |= {p for p in self.ddp.parameters() if p not in reads.arrived}
        if not left_out <= self._left_out:
            self._left_out |= left_out
            self._buckets.clear()
        if self._watched == WATCHED_STEPS and not self._debug:
            reads.close()
            self.reads = None

    def _step(self) -> Taken | None:
        optimizer = self.optimizer
        if self._stale or not self.started:
            return optimizer._step_all(optimizer._prepare)
        if self._kind == "clip":
            return optimizer._step_all(lambda: measured(optimizer._prepare(), self.started))
        works = self._works_of_the_rest()
        check_recording(works)
        now = numbers(all(work.backend.reads_device for work in works), None, None)
        taken = [pair for started in self.started for pair in started.finish(self._kind)]
        rest = optimizer._take(works, now)
        assert rest is not None  # nobody needs the norm, which alone decides
        return taken + rest

    def _works_of_the_rest(self) -> list[Work]:
        """Of parameters that no bucket had."""
        covered = set(self._covered())
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        grads = {p: p.grad for p in params if p.grad is not None and p not in covered}
        works = []
        for part in parts_of(self.optimizer, grads):
            part.take_plan_of(self._rest.get(part.number))
            try:
                works += part.works(self.optimizer)
            except (Mismatch, KeyError):
                self.optimizer._plan_again(part.number)
                part.plan = None
                works += part.works(self.optimizer)
            self._rest[part.number] = part
        return works
