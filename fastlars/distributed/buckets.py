"""A bucket of DDP as the optimizer sees it: lists of its parameters, ready to be stepped."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from fastlars.backends.base import Mismatch, StepScalars, is_dense
from fastlars.distributed.average import Future
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.numbers import Numbers, numbers
from fastlars.optim.plan import Plan
from fastlars.optim.values import same_objects
from fastlars.optim.work import Work, mark_written
from fastlars.rules import GradientNorm


@dataclass
class Part:
    """Parameters of one group, their gradients, and the plan to step them."""

    number: int
    indices: list[int]
    grads: list[Tensor]
    whole: Plan | None = None
    plan: Plan | None = None

    def works(self, optimizer: FusedOptimizer) -> list[Work]:
        """What to do for these parameters, checked and bound.

        Raises:
            Mismatch: the optimizer's own plan of the group no longer fits.
            KeyError: a state is gone.
        """
        group = optimizer.param_groups[self.number]
        rule = optimizer._rule(self.number, group)
        whole = optimizer._plans[self.number]
        if whole is None:
            raise KeyError(self.number)
        if self.plan is None or whole is not self.whole:
            self.whole, self.plan = whole, whole.part(self.indices, self.grads)
            optimizer._note_states()  # which the part has made
        return [Work(group, rule, sublist, bound) for sublist, bound in self.plan.bind(self.grads)]

    def take_plan_of(self, other: Part | None) -> None:
        """Go on with the plan that an earlier step made for the same parameters."""
        if other is not None and other.indices == self.indices:
            self.whole, self.plan = other.whole, other.plan


def parts_of(optimizer: FusedOptimizer, grads: dict[Tensor, Tensor]) -> list[Part]:
    """Parts for those parameters of the optimizer that have one of these gradients."""
    parts = []
    for number, group in enumerate(optimizer.param_groups):
        indices = [i for i, p in enumerate(group["params"]) if p in grads]
        if indices:
            own = [grads[group["params"][i]] for i in indices]
            parts.append(Part(number, indices, own))
    return parts


def views(params: list[Tensor], bucket: GradBucket, flat: Tensor) -> list[Tensor]:
    """The gradients in ``flat``, which is laid out as the bucket's buffer."""
    start = bucket.buffer().storage_offset()
    found = []
    for p, gradient in zip(params, bucket.gradients(), strict=True):
        offset = gradient.storage_offset() - start + flat.storage_offset()
        # bucket.gradients() takes every gradient for contiguous; DDP lays it out as its parameter.
        strides = p.stride() if is_dense(p) else gradient.stride()
        found.append(flat.as_strided(p.shape, strides, offset))
    return found


@dataclass
class Bucket:
    """What is kept of a bucket from step to step, until DDP builds its buckets anew."""

    params: list[Tensor]
    storage: int
    reduced: Tensor  # what is added up over the processes: DDP's buffer, or a half-precision one
    parts: list[Part]

    @classmethod
    def of(
        cls,
        bucket: GradBucket,
        optimizer: FusedOptimizer,
        dtype: torch.dtype | None,
        left_out: set[Tensor],
    ) -> Bucket:
        """Args:
        dtype: of the compression; buckets of float16 and bfloat16 are as short as it gets.
        left_out: parameters that the bucket must not step.
        """
        buffer = bucket.buffer()
        params = bucket.parameters()
        reduced = buffer
        if dtype is not None and buffer.dtype.itemsize > 2:
            reduced = torch.empty_like(buffer, dtype=dtype)
        grads = zip(params, views(params, bucket, reduced), strict=True)
        grads_of = {p: g for p, g in grads if p not in left_out}
        storage = buffer.untyped_storage()._cdata
        parts = parts_of(optimizer, grads_of)
        return cls(params, storage, reduced, parts)

    def fits(self, bucket: GradBucket) -> bool:
        """Whether this is still the same memory for the same parameters."""
        params = bucket.parameters()
        return bucket.buffer().untyped_storage()._cdata == self.storage and same_objects(
            params, self.params
        )

    def covers_all(self) -> bool:
        """Whether nobody needs the gradients of this bucket but its works."""
        return sum(len(part.indices) for part in self.parts) == len(self.params)

    def works(self, optimizer: FusedOptimizer) -> list[Work] | None:
        """What to do once the gradients are there; None where ``optimizer.step()`` has to look."""
        try:
            return [work for part in self.parts for work in part.works(optimizer)]
        except (Mismatch, KeyError, TypeError, ValueError, RuntimeError):
            return None  # step() meets the same, and says what it is


@dataclass
class Started:
    """A bucket under way: its works with the numbers they were started with, and what came out."""

    works: list[Work]
    scalars: list[StepScalars]
    future: Future[list[Tensor]] | None = None
    results: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def of(cls, works: list[Work], for_norm: bool) -> Started:
        """Reads the learning rates; not where only the gradients' norm is wanted."""
        now = numbers(all(work.backend.reads_device for work in works), None, None)
        if for_norm:
            return cls(works, [now.unclipped(work.sign, work.device) for work in works])
        return cls(works, [work.scalars(now) for work in works])

    def params(self) -> list[Tensor]:
        """The parameters of all works."""
        return [p for work in self.works for p in work.sublist.weights]

    def take(self, kind: str | None) -> None:
        """Do what can be done before ``optimizer.step()``: see Engine for the kinds."""
        if kind == "step":
            # Before the write: what backward still needs of these weights, it then refuses.
            mark_written(self.works)
        for work, scalars in zip(self.works, self.scalars, strict=True):
            backend = work.backend
            if kind == "step":
                self.results.append(backend.step(work.rule, work.bound, scalars))
            elif kind == "clip":
                self.results.append(backend.measure(GradientNorm(), work.bound, scalars))
            elif work.rule.adapt:
                self.results.append(backend.measure(work.rule, work.bound, scalars))
            else:
                self.results.append(None)

    def finish(self, kind: str | None) -> list[tuple[list[Tensor], Tensor]]:
        """Apply what was only measured; parameters and their trust ratios."""
        taken = []
        for work, scalars, result in zip(self.works, self.scalars, self.results, strict=True):
            if kind != "step":
                result = work.backend.apply(work.rule, work.bound, scalars, result)
            assert result is not None
            taken.append((work.sublist.weights, result))
        if kind != "step":
            mark_written(self.works)
        return taken


@dataclass
class Measured(Work):
    """A list whose gradients' sums of squares are known already."""

    sums: Tensor

    def square_norms(self, now: Numbers) -> Tensor:
        return self.sums


def measured(works: list[Work], started: list[Started]) -> list[Work]:
    """The works, with the sums that the buckets' own lists gave where they hold all of a list."""
    rows: dict[Tensor, tuple[Tensor, int]] = {}
    for each in started:
        for work, sums in zip(each.works, each.results, strict=True):
            assert sums is not None
            rows.update((p, (sums, i)) for i, p in enumerate(work.sublist.weights))
    return [_with_sums(work, rows) for work in works]


def _with_sums(work: Work, rows: dict[Tensor, tuple[Tensor, int]]) -> Work:
    params = work.sublist.weights
    if not all(p in rows for p in params):
        return work
    starts: dict[int, int] = {}
    tensors: list[Tensor] = []
    end = 0
    for p in params:
        sums = rows[p][0]
        if id(sums) not in starts:
            starts[id(sums)] = end
            tensors.append(sums)
            end += len(sums)
    places = [starts[id(rows[p][0])] + rows[p][1] for p in params]
    order = torch.tensor(places, device="cpu")
    every = torch.cat(tensors)
    sums = every[order.to(every.device, non_blocking=True)]
    return Measured(work.group, work.rule, work.sublist, work.bound, sums)
