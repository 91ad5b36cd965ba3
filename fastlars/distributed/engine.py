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
from fastlars.distributed.refusals import check_groups, check_scaler
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.numbers import numbers
from fastlars.optim.values import kept, unchanged
from fastlars.optim.work import Taken, Work, check_recording


class Engine:
    """Overlaps the steps of one optimizer with the backward passes of one DDP module.

    A step is of one of these kinds, chosen when its first bucket arrives: "step" (a bucket is
    stepped when it is reduced), "measure" (its sums of squares are taken then), "clip" (the
    gradients' alone, for the global norm), or None: all is left to ``optimizer.step()``.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        optimizer: FusedOptimizer,
        average: Average,
        dtype: torch.dtype | None,
        mode: str,
    ) -> None:
        self.ddp = ddp
        self.optimizer = optimizer
        self.release: Callable[[], None] = lambda: None
        self.leaving = False
        self._average = average
        self._dtype = dtype
        self._mode = mode
        self._buckets: dict[int, Bucket] = {}
        self._rest: dict[int, Part] = {}
        self._used: set[Tensor] | None = None
        # The first step is left to optimizer.step(): it makes states and plans, with all their
        # checks, and shows a GradScaler before it is too late. DDP has but one bucket then anyway.
        self._knows = False
        # Not as a decorator: it imports torch._dynamo, as DDP does when one is made.
        self.step = torch.compiler.disable(self._finish)
        self._rearm()

    def _rearm(self) -> None:
        self._arrived = False  # the first bucket
        self._reduced = False  # a whole backward pass
        self._refused = False
        self._kind: str | None = None
        self._values: list[list[Any]] = []
        self._versions: int | None = None
        self.started: list[Started] = []

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """DDP's hook: average the bucket, and step it where that can be done now."""
        buffer = bucket.buffer()
        if self._reduced:
            return self._refuse(bucket)
        kept = self._bucket(bucket) if buffer.layout == torch.strided else None
        # Else a process reduces what others, which it has joined, still train with.
        in_backward = torch._C._current_graph_task_id() != -1
        started = self._begin(kept) if in_backward and kept is not None else None
        if in_backward and bucket.is_last():
            # Not with the first one: backward passes within this one (checkpoints) end earlier.
            Variable._execution_engine.queue_callback(self._end_of_backward)
        if kept is None or kept.reduced is buffer:
            future = self._average.start(self._average.scale(buffer, bucket))
            result = future.then(first_value)
        else:
            future = self._average.start(compress(buffer, self._average.size, kept.reduced))
            if started is not None and self._kind != "clip" and kept.covers_all():
                result = future.then(lambda _: buffer)
            else:
                result = future.then(lambda f: buffer.copy_(first_value(f)))
        if started is not None:
            # After DDP's own, which backward waits for. On CUDA, futures run this on a stream of
            # its own that waits for the reduction.
            started.future = future.then(partial(self._take, started))
        return result

    def _bucket(self, bucket: GradBucket) -> Bucket:
        kept = self._buckets.get(bucket.index())
        if kept is None or not kept.fits(bucket, self.optimizer):
            kept = Bucket.of(bucket, self.optimizer, self._dtype, self._used)
            self._buckets[bucket.index()] = kept
        return kept

    def _begin(self, kept: Bucket) -> Started | None:
        if not self._arrived:
            self._arrived = True
            self._kind = self._choose()
            self._values = self._hyper_parameters()
        works = kept.works(self.optimizer) if self._kind is not None else None
        if not works:
            return None
        started = Started.of(works, for_norm=self._kind == "clip")
        self.started.append(started)
        return started

    def _choose(self) -> str | None:
        optimizer = self.optimizer
        groups, plans = optimizer.param_groups, optimizer._plans
        planned = len(plans) == len(groups) and None not in plans
        if not (self._knows and planned and optimizer._states_are_planned()):
            return None
        if any(group["stochastic_rounding"] or group["capturable"] for group in groups):
            return None  # step() refuses them
        if optimizer._needs_norm():
            return "clip"
        return "measure" if self._mode == "norms" else "step"

    def _take(self, started: Started, future: Future[list[Tensor]]) -> list[Tensor]:
        """Once a bucket is reduced, in the thread that waited for it. What came out is the value of
        a future, because on CUDA that is what whoever waits for the future waits for: without a
        tensor there, for nothing."""
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
            "last under no_sync()"
        )

    def _end_of_backward(self) -> None:
        """Nothing is under way when backward returns; on CUDA, for the current stream."""
        self._reduced = True
        self.wait()
        # DDP's own callback comes next, and writes gradients.
        Variable._execution_engine.queue_callback(self._note_versions)

    def wait(self) -> None:
        """Until every bucket is stepped; raises what went wrong."""
        for started in self.started:
            if started.future is not None:
                started.future.wait()

    def _covered(self) -> list[Tensor]:
        return [p for started in self.started for p in started.params()]

    def _note_versions(self) -> None:
        self._versions = _versions(self._covered())

    def _hyper_parameters(self) -> list[list[Any]]:
        names = list(self.optimizer.defaults)
        return [[_plain(group[n]) for n in names] for group in self.optimizer.param_groups]

    def _check_unchanged(self) -> None:
        if self._versions is not None and _versions(self._covered()) != self._versions:
            raise RuntimeError(
                "a gradient was changed between backward and optimizer.step(): overlap has used it "
                "already. For a global clip, set max_grad_norm"
            )
        decides = self._kind != "clip" and bool(self.optimizer._needs_norm())  # set only now
        if decides or not unchanged(self._values, self._hyper_parameters()):
            raise RuntimeError(
                "a hyper-parameter was changed between backward and optimizer.step(): overlap "
                "has used it already. Change it before backward, or after optimizer.step()"
            )

    def _finish(self) -> Taken | None:
        """What ``optimizer.step()`` has left to do; parameters and their trust ratios, or None
        where the step was skipped."""
        try:
            check_scaler(self.optimizer)
            check_groups(self.optimizer)
            self.wait()
            if self._refused:
                raise RuntimeError(
                    "gradients hold a second backward pass, which overlap refused: go on with "
                    "zero_grad() and a backward pass"
                )
            if self.started:
                self._check_unchanged()
            taken = self._step()
            if self.ddp.static_graph and self._used is None:
                # What gets no gradient now never will; DDP leaves zeros in the buckets for it.
                self._used = {p for p in self._parameters() if p.grad is not None}
                self._buckets.clear()
            self._knows = True
            return taken
        finally:
            self._rearm()
            if self.leaving:
                self.release()

    def _step(self) -> Taken | None:
        optimizer = self.optimizer
        if not self.started:
            works = optimizer._prepare()
        elif self._kind == "clip":
            works = measured(optimizer._prepare(), self.started)
        else:
            works = self._works_of_the_rest()
        check_recording(works)
        now = numbers(all(work.backend.reads_device for work in works), None, None)
        done = [] if self._kind == "clip" else self.started
        taken = [pair for started in done for pair in started.finish(self._kind)]
        rest = optimizer._take(works, now)
        return None if rest is None else taken + rest

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _works_of_the_rest(self) -> list[Work]:
        """Of parameters that no bucket had."""
        covered = set(self._covered())
        grads = {p: p.grad for p in self._parameters() if p.grad is not None and p not in covered}
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


def _versions(params: list[Tensor]) -> int:
    """Grows with every write to a gradient; -1 where one is gone."""
    total = 0
    for p in params:
        if p.grad is None:
            return -1
        total += p.grad._version
    return total


def _plain(value: Any) -> Any:
    """A value to compare with later: of a tensor the number, where reading it does not wait."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return id(value)
    return kept(value)
