"""Arrivals: an engine that hooks on parameters tell of complete gradients."""

from __future__ import annotations

from typing import Any

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

# Pieces whose plans are kept: parameters arrive in the same order at every step, except in models
# that drop layers. A plan holds a few words for each tensor.
MAX_PIECES = 512


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
        self._hooks = [p.register_post_accumulate_grad_hook(self.arrive) for p in params]
        super().__init__(optimizer, params, mode, debug)

    def reset(self) -> None:
        super().reset()
        self._arrived: set[Tensor] = set()  # in this step
        self._waiting = Waiting()  # those that are in no piece yet
        self._running: set[int] = set()  # backward passes that have not ended

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
        if running in self._running:
            return
        self._running.add(running)
        self._ended = False

        def end() -> None:
            self._running.discard(running)
            self._ended = self._begun and not self._running

        Variable._execution_engine.queue_callback(end)

    def watch(self, outputs: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            self._running.clear()  # of backward passes that have failed
        for node in nodes_of(outputs):
            node.register_prehook(self.note_backward)
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
            if len(self._pieces) == MAX_PIECES:
                self._pieces.clear()
            self._pieces[params[0]] = params, slices
        for part in slices:
            members = self.optimizer.param_groups[part.number]["params"]
            part.grads = [members[i].grad for i in part.indices]
        return slices

    def _begin_piece(self, piece: InFlightPiece) -> None:
        with torch.no_grad():
            piece.work_early()
        self.in_flight.append(piece)

    def forget_pieces(self) -> None:
        self._pieces.clear()

    def close(self) -> None:
        super().close()
        for hook in self._hooks:
            hook.remove()
