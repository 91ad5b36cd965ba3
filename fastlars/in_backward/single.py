"""step_in_backward(): step an optimizer during the backward pass of a module on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlars.in_backward.arrivals import Arrivals
from fastlars.in_backward.handle import Handle, attach
from fastlars.in_backward.norm_pass import NormPass
from fastlars.in_backward.pieces import EarlyWork, InFlightPiece
from fastlars.in_backward.released import ReleasedGradient, is_released
from fastlars.in_backward.validation import shared_parameters
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.dtensor import is_dtensor
from fastlars.optim.execute import StepResults
from fastlars.optim.scalars import Scalars, scalars_for
from fastlars.ranges import real

MIB = 2**20


class BackwardHandle(Handle):
    """Returned by :func:`fastlars.step_in_backward`. A copied or unpickled handle does nothing."""

    _engine: BackwardEngine | None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let gradients add up in ``p.grad``, in all backward passes of a step but the last.

        Example:
            >>> import torch, fastlars
            >>> w = torch.nn.Linear(4, 1, bias=False)
            >>> _ = torch.nn.init.ones_(w.weight)
            >>> optimizer = fastlars.LARS(w.parameters(), lr=5.0)
            >>> handle = fastlars.step_in_backward(w, optimizer)
            >>> with handle.accumulate():
            ...     w(torch.ones(4)).backward()
            >>> w.weight.grad.tolist()
            [[1.0, 1.0, 1.0, 1.0]]
            >>> w(torch.ones(4)).backward()
            >>> optimizer.step()
        """
        engine = self._engine
        if engine is None:
            yield
            return
        before, engine.accumulates = engine.accumulates, True
        try:
            yield
        finally:
            engine.accumulates = before

    @contextmanager
    def norm_pass(self) -> Iterator[None]:
        """Only measure the norm of the gradients in the backward pass inside, and free them.

        ``max_grad_norm`` and ``skip_if`` need the norm of all gradients before the first weight
        is written. A second pass through the same graph then steps::

            with handle.norm_pass():
                loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()

        It costs one more backward pass, and saves the memory that gradients of all layers need.
        Where nothing needs the norm, this does nothing in the backward pass inside but free the
        gradients.

        Raises:
            RuntimeError: a parameter has a gradient already, which the norm would not include.
        """
        engine = self._engine
        if engine is None:
            raise RuntimeError("norm_pass() needs step_in_backward, which was removed")
        with engine.measuring():
            yield


def step_in_backward(
    model: nn.Module,
    optimizer: FusedOptimizer,
    *,
    bucket_mb: float = 25.0,
    except_for: Iterable[Tensor] = (),
    debug: bool = False,
) -> BackwardHandle:
    """Step layers during backward as soon as their gradients are complete, and free the gradients.

    LARS, LAMB, LANS and RMSprop warm-up need nothing but a layer's own weights, gradients and
    states: weights and states have the same bits as after a backward pass and ``optimizer.step()``.
    At most about ``bucket_mb`` of gradients exist at the same time, instead of 4 bytes a parameter.

    Call it once, before the first backward pass; the training loop stays as it is.
    ``optimizer.step()`` steps what is left, counts the step, and makes the gradients None.
    Hyper-parameters are read during backward: change them before it or after ``optimizer.step()``,
    as schedulers do. Parameters change while backward runs, and are new when it returns: after an
    error in it, some may be a step ahead of others, so go on from a checkpoint.
    More in docs/distributed.md, "One device".

    Args:
        model: a module on one device, not inside DDP or FSDP; for those see
            :func:`fastlars.distributed.overlap`. Its forward pass may be compiled: what one graph
            computes becomes complete at the same time, at the end of its backward pass.
        optimizer: the :class:`fastlars.LARS`, :class:`fastlars.LAMB`, :class:`fastlars.LANS` or
            :class:`fastlars.RMSpropWarmup` that steps parameters of ``model``; it may have others
            as well. Or a wrapper around one, as of Lightning, Fabric and Accelerate.
        bucket_mb: how many MiB of gradients are gathered, above 0, before one call steps their
            parameters. Default 25. Less frees more memory; each call costs the host some 30 us.
        except_for: parameters that ``optimizer.step()`` steps, and whose gradients stay until then.
            Default none. For weights that backward reads again after their gradients are complete,
            and those whose gradients arrive in several parts, such as a weight shared by several
            segments of reentrant activation checkpointing.
        debug: True makes in every step the checks that are otherwise made in the first ten: that no
            weight or state was changed through ``.data`` between backward and ``optimizer.step()``,
            and that backward reads no weight after its step. Default False.

    Returns:
        A handle: ``remove()`` goes back to ordinary steps; ``accumulate()`` and ``norm_pass()`` are
        contexts for backward passes that do not step.

    Raises:
        TypeError: ``optimizer`` is not one of fastlars, or a parameter cannot be stepped.
        ValueError: ``bucket_mb`` is not positive, or no parameter in common.
        RuntimeError: a DDP module, or sharded parameters; parameters on several devices. Raised
            later, where it shows: ``max_grad_norm`` or ``skip_if`` without a ``norm_pass()``; a
            ``GradScaler``; a second backward pass before ``optimizer.step()`` without
            ``accumulate()``; any use of a gradient that was freed; a backward pass that failed;
            weights that backward reads late, and weights, states or hyper-parameters that were
            changed between backward and ``optimizer.step()``.

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> w = torch.nn.init.ones_(model.weight)
        >>> optimizer = fastlars.LARS(model.parameters(), lr=5.0, momentum=0.0)
        >>> handle = fastlars.step_in_backward(model, optimizer, bucket_mb=1e-6)
        >>> model(torch.ones(3, 4)).mean().backward()  # all gradients are 1: w shrinks by lr eta
        >>> w.grad, [round(x, 6) for x in w[0].tolist()]
        (ReleasedGradient(), [0.995, 0.995, 0.995, 0.995])
        >>> optimizer.step()
        >>> w.grad, [round(x, 6) for x in w[0].tolist()]
        (None, [0.995, 0.995, 0.995, 0.995])
    """
    if not real("bucket_mb", bucket_mb) > 0.0:
        raise ValueError(f"bucket_mb must be positive, got {bucket_mb}")
    check_no_ddp(model)
    optimizer, params = shared_parameters(optimizer, model, "step_in_backward")
    if any(map(is_dtensor, params)):
        raise RuntimeError(
            "step_in_backward is for parameters that are not sharded: use "
            "fastlars.distributed.overlap"
        )
    if len(devices := {p.device for p in params}) > 1:
        raise RuntimeError(
            "step_in_backward needs all parameters on one device, got "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in params):
        raise RuntimeError(
            "step_in_backward does not go with _apply_optimizer_in_backward: two optimizers would "
            "step the same parameters"
        )
    excluded = set(except_for)
    optimizer.planner.check(
        optimizer.param_groups, optimizer.state, {p: p.detach() for p in params}
    )
    engine = BackwardEngine(model, optimizer, params, int(bucket_mb * MIB), excluded, debug)
    attach(engine, model)
    return BackwardHandle(engine)


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

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        bucket_bytes: int,
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

    def check_options(self) -> None:
        pass

    def before_forward(self) -> None:
        if not torch.compiler.is_compiling():
            check_no_ddp(self._model)

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
                "a gradient has arrived after its parameter was stepped, in a backward pass that "
                "ended in an error, or whose optimizer.step() is missing: go on from a checkpoint"
            )

    def flush(self) -> None:
        params, optimizer = self._waiting.take(), self.optimizer
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
        for b in batches:
            b.bound = None
        for p in params:
            p.grad = ReleasedGradient(p)
        if not scalars.skip:
            self._snapshot(params, None)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """See :meth:`BackwardHandle.norm_pass`."""
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
        results = super().finish()
        for p in params:
            if is_released(p.grad):
                p.grad = None
        return results
