"""BackwardEngine: steps parameters of one device as their gradients arrive, and frees these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlars.backends.upload import is_capturing
from fastlars.in_backward.arrivals import Arrivals
from fastlars.in_backward.norm_pass import NormPass
from fastlars.in_backward.pieces import EarlyWork, InFlightPiece
from fastlars.in_backward.released import ReleasedGradient, is_released
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.execute import StepResults
from fastlars.optim.scalars import Scalars, scalars_for


def check_no_ddp(model: nn.Module) -> None:
    """Raise where DDP would average gradients only after they were used."""
    # DDP sets this attribute while its forward pass runs.
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is not None or any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise RuntimeError(
            "step_in_backward is for one device, and would step with gradients that DDP has not "
            "averaged: use fastlars.distributed.overlap"
        )


class BackwardEngine(Arrivals):
    """Steps parameters as soon as enough of them have arrived, and frees their gradients.

    It does so from the first step on: if it left some to ``optimizer.step()``, as DDP's engine
    does, these would need the memory that is to be saved.
    """

    untouched_steps = 0
    without_writing = "Ordinary steps go with it"

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        bucket_bytes: float,
        excluded: set[Tensor],
        debug: bool,
    ) -> None:
        self.accumulates = False
        self._model = model
        self._bucket_bytes = bucket_bytes
        self._norm_pass: NormPass | None = None  # since the last step
        self._measures = False  # the backward pass that runs is of a norm pass
        super().__init__(optimizer, params, "step", debug)
        self._left_out |= excluded

    def reset(self) -> None:
        super().reset()
        self._scalars: Scalars | None = None  # of this step
        self._norm_pass = None

    def before_forward(self) -> None:
        if not torch.compiler.is_compiling():
            check_no_ddp(self._model)

    def watch(self, outputs: Any) -> None:
        unused = self._begun and self._scalars is None and not self.in_flight
        if unused and torch._C._current_graph_task_id() == -1:
            self.reset()  # the batch before may be skipped after its backward pass
        super().watch(outputs)

    def may_write(self) -> bool:
        return True  # also with a clip, once the norm is known

    def arrive(self, p: Tensor) -> None:
        if self._measures:
            assert self._norm_pass is not None
            self._norm_pass.take(p)
        elif not self.accumulates:
            super().arrive(p)

    def begin(self) -> None:
        optimizer = self.optimizer
        if is_capturing(self._params[0].device):
            raise RuntimeError(
                "step_in_backward does not go with a CUDA graph of the backward pass: take "
                "ordinary steps, which a graph can record"
            )
        needs = self._needs_norm()
        if needs and self._norm_pass is None:
            raise RuntimeError(
                f"{needs} needs the norm of all gradients before the first weight is written: run "
                "a backward pass under norm_pass() of step_in_backward's handle first, with "
                "retain_graph=True"
            )
        optimizer.planner.keep_up_with(optimizer.param_groups, optimizer.state)
        super().begin()
        if needs:
            assert self._norm_pass is not None
            self._scalars = self._norm_pass.decide()

    def choose_early_work(self) -> EarlyWork | None:
        return "step"

    def is_full(self, p: Tensor) -> bool:
        return self._waiting.nbytes >= self._bucket_bytes

    def arrived_again(self, p: Tensor) -> None:
        # One that still waits is stepped with the sum of its gradients.
        if p in set(self._covered()):
            raise RuntimeError(
                "a gradient has arrived after its parameter was stepped. The backward pass before "
                "this one ended in an error, was not followed by optimizer.step(), or was of "
                "another loss, which belongs under accumulate(): go on from a checkpoint"
            )

    def flush(self) -> None:
        # Without a gradient: zero_grad() came after a backward pass that was not stepped.
        params = [p for p in self._waiting.take() if p.grad is not None]
        optimizer = self.optimizer
        if not params:
            return
        if self._norm_pass is not None and self._scalars is not None:
            self._norm_pass.check_measured(params)
        slices = self._slices(params)
        with torch.no_grad():
            batches = optimizer.planner.bind_slices(slices, optimizer.param_groups, optimizer.state)
        scalars = self._scalars or scalars_for(b.backend for b in batches)
        if not scalars.skip:
            each = [b.step_scalars(scalars) for b in self._rounding.prepare(batches)]
            self._begin_piece(InFlightPiece(batches, each, "step"))
        # Whatever refers to the gradients, so that their memory is free for the next ones.
        for part in slices:
            part.grads = []
        used = [p for b in batches for p in b.batch.weights]
        for b in batches:
            b.bound = None
        for p in used:
            p.grad = ReleasedGradient(p)
        if not scalars.skip:
            self._snapshot(used, None)

    def check_accumulates(self) -> None:
        """Raise where gradients cannot be added up in this step any more."""
        if self._norm_pass is not None:
            raise RuntimeError(
                "accumulate() after norm_pass(): the norm would be of a part of the gradients"
            )

    def loaded(self) -> None:
        if self._is_cut_off():
            self.reset()
            self._gradients_used = False
            for p in self._params:
                p.grad = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """See ``BackwardHandle.norm_pass``."""
        if self._begun:
            raise RuntimeError("norm_pass() comes before the backward pass that steps")
        stepped = {p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad}
        if not stepped.issubset(self._params):
            raise RuntimeError(
                "norm_pass() measures gradients of the model alone, but the optimizer steps other "
                "parameters too"
            )
        if any(p.grad is not None for p in self._params):
            raise RuntimeError(
                "norm_pass() measures one backward pass alone, but parameters have gradients "
                "already: call zero_grad() first"
            )
        self._norm_pass = NormPass(self.optimizer, self._bucket_bytes, self._left_out)
        self._measures = True
        try:
            yield
            self._norm_pass.end()
        except BaseException:
            self._norm_pass = None
            raise
        finally:
            self._measures = False
            if self.reads is not None:
                self.reads.forget()  # no weight was stepped

    def raise_cut_off(self) -> None:
        stepped, every = len(self._covered()), len(self._params)
        raise RuntimeError(
            f"backward ended in an error after {stepped} of {every} parameters were stepped: go on "
            "from a checkpoint"
        )

    def step_rest(self) -> StepResults | None:
        stepper = self.optimizer.stepper
        if self._scalars is None or self._norm_pass is None:
            return super().step_rest()
        if self._scalars.skip:
            stepper.skip()
            return None
        batches = self._rounding.prepare(self._bind_rest())
        self._norm_pass.check_measured([p for b in batches for p in b.batch.weights])
        rest = stepper.run(batches, self._scalars)
        return [one for each in self.in_flight for one in each.finish()] + rest

    def finish(self) -> StepResults | None:
        params = self._params
        if self._norm_pass is not None and not self._begun:
            raise RuntimeError(
                "optimizer.step() after norm_pass() alone, which only measures: a second backward "
                "pass steps"
            )
        results = super().finish()
        for p in params:
            if is_released(p.grad):
                p.grad = None
        return results
