"""Arrivals: an engine that hooks on parameters tell of complete gradients."""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import Variable

from fastlars.in_backward.engine import Engine
from fastlars.in_backward.late_reads import nodes_of
from fastlars.in_backward.pieces import InFlightPiece
from fastlars.in_backward.waiting import Waiting
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.planner import GroupSlice, slices_of
from fastlars.optim.values import same_objects


class RunningPass:
    """A backward pass that runs. Autograd's callback alone holds it, also if the pass fails."""

    def __init__(self, number: int) -> None:
        self.number = number


class Arrivals(Engine):
    """Gathers parameters whose gradients are complete, until a piece of them is stepped.

    torch calls a parameter's hook when its gradient is complete: at once for a plain parameter, for
    a shard of FSDP2 after its reduce-scatter.
    """

    def __init__(
        self, optimizer: FusedOptimizer, params: list[Tensor], mode: str, debug: bool
    ) -> None:
        # By the piece's first parameter: all its parameters, and their slices with their plans.
        self._pieces: dict[Tensor, tuple[list[Tensor], list[GroupSlice]]] = {}
        # The compiler would compile hooks again and again.
        hook: Any = torch.compiler.disable(lambda p: self.arrive(p))
        hook.engine = type(self)
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in params]
        self._noting = torch.compiler.disable(self.note_backward)
        super().__init__(optimizer, params, mode, debug)

    def reset(self) -> None:
        super().reset()
        self._arrived: set[Tensor] = set()  # in this step
        self._waiting = Waiting()  # those that are in no piece yet
        self._running: WeakSet[RunningPass] = WeakSet()  # backward passes that have not ended

    def begin(self) -> None:
        dynamo = sys.modules.get("torch._dynamo.compiled_autograd")
        if getattr(dynamo, "in_compiled_autograd_region", False):
            raise RuntimeError(
                "steps during backward do not go with compiled autograd, which calls no hook at "
                "the end of a backward pass: set torch._dynamo.config.compiled_autograd = False, "
                "or take ordinary steps"
            )
        super().begin()

    def arrive(self, p: Tensor) -> None:
        """The hook of a parameter."""
        self.note_backward()
        if self.reads is None:
            self._take(p)
            return
        self.reads.paused = True
        try:
            self._take(p)
        finally:
            self.reads.paused = False

    def note_backward(self, *_: Any) -> None:
        """Note the backward pass that is running; and its end, if it ends without an error.

        The hooks of the module's outputs call this first, so that a backward pass within this one,
        as of activation checkpointing, does not count as its end.
        """
        running = torch._C._current_graph_task_id()
        if any(each.number == running for each in self._running):
            return
        this = RunningPass(running)
        self._running.add(this)
        self._ended = False

        def end() -> None:
            self._running.discard(this)
            self._ended = self._begun and not self._running

        Variable._execution_engine.queue_callback(end)

    def watch(self, outputs: Any) -> None:
        for node in nodes_of(outputs):
            node.register_prehook(self._noting)
        super().watch(outputs)

    def _take(self, p: Tensor) -> None:
        if not self._begun:
            self.begin()
        if p in self._arrived:
            self.arrived_again(p)
            return
        self._arrived.add(p)
        if p in self._left_out:
            return
        self._waiting.add(p)
        if self.is_full(p):
            self.flush()

    def is_full(self, p: Tensor) -> bool:
        """Whether the waiting parameters, to which ``p`` was just added, make a piece."""
        raise NotImplementedError

    def arrived_again(self, p: Tensor) -> None:
        """A parameter's gradient has changed since it arrived in this step."""
        raise NotImplementedError

    def flush(self) -> None:
        """Do the early work of the waiting parameters."""
        raise NotImplementedError

    def _slices(self, params: list[Tensor]) -> list[GroupSlice]:
        """The slices of a piece, with the plans that earlier steps have made for them."""
        known, slices = self._pieces.get(params[0], ([], []))
        if not same_objects(known, params):
            grads: dict[Tensor, Any] = {p: p.grad for p in params}
            slices = slices_of(self.optimizer.param_groups, grads)
            self._pieces[params[0]] = params, slices
        for part in slices:
            members = self.optimizer.param_groups[part.number]["params"]
            part.grads = [members[i].grad for i in part.indices]
        return slices

    def _begin_piece(self, piece: InFlightPiece) -> None:
        self.in_flight.append(piece)  # first: after an error in it, some may have been written
        with torch.no_grad():
            piece.work_early()

    def forget_pieces(self) -> None:
        self._pieces.clear()

    def close(self) -> None:
        super().close()
        for hook in self._hooks:
            hook.remove()
