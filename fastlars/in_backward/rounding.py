"""Rounding: the random numbers of a step that is taken piece by piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer
from fastlars.optim.execute import BoundBatch, draw_seed
from fastlars.optim.values import same_objects


class Rounding:
    """Gives the pieces of a step the random bits of the whole step.

    A whole step draws a seed for each of its batches that rounds stochastically, and a tensor draws
    its bits by its index there. Pieces take the same seeds and indices: those of a step in which
    every parameter that requires a gradient has one.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._seeds: list[int] = []  # of this step, by batch
        self._known: list[Any] = []  # the parameters, and which groups round
        # By parameter: the number of its batch among those that round, and its index there.
        self._places: dict[Tensor, tuple[int, int]] = {}

    def forget_seeds(self) -> None:
        """The step has ended."""
        self._seeds = []

    def prepare(self, batches: list[BoundBatch]) -> list[BoundBatch]:
        """The batches of a piece, with their seeds, which the first piece of a step draws."""
        for b in batches:
            if not b.rounds:
                continue
            if not self._seeds:
                self._draw()
            places = [self._places[p] for p in b.batch.weights]
            b.seed = self._seeds[places[0][0]]
            streams = torch.tensor([i for _, i in places], dtype=torch.int32, device="cpu")
            b.streams = streams.to(b.device)
        return batches

    def _draw(self) -> None:
        """Draw the seeds of a step."""
        groups = self._optimizer.param_groups
        every = [p for group in groups for p in group["params"]]
        params = [p for p in every if p.requires_grad or p.grad is not None]
        known = [*params, *(group["stochastic_rounding"] for group in groups)]
        if not same_objects(known, self._known):
            self._known = known
            self._find_places(params)
        self._seeds = [draw_seed() for _ in {number for number, _ in self._places.values()}]

    def _find_places(self, params: list[Tensor]) -> None:
        optimizer = self._optimizer
        groups, states = optimizer.param_groups, optimizer.state
        rounding = [
            [groups[number]["params"][i] for i in indices]
            for number, key, indices in optimizer.planner.check(
                groups, states, {p: p.detach() for p in params}
            )
            if groups[number]["stochastic_rounding"] and key.dtypes.weight == torch.bfloat16
        ]
        self._places = {
            p: (number, i) for number, batch in enumerate(rounding) for i, p in enumerate(batch)
        }
