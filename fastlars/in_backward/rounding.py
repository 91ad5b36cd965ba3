"""Rounding: the random numbers of a step that is taken piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer
from fastlars.optim.execute import BoundBatch, draw_seed


class Rounding:
    """Gives the pieces of a step the random bits of the whole step.

    A whole step draws a seed for each of its batches that rounds stochastically, and a tensor draws
    its bits by its index there. Pieces take the same seeds and indices: those of a step in which
    every parameter that requires a gradient has one.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._seeds: list[int] = []  # of this step, by batch
        self.forget_batches()

    def forget_batches(self) -> None:
        """The parameters of a group have changed."""
        # By parameter: the number of its batch among those that round, and its index there.
        self._places: dict[Tensor, tuple[int, int]] | None = None
        self._count = 0

    def forget_seeds(self) -> None:
        """The step has ended."""
        self._seeds = []

    def prepare(self, batches: list[BoundBatch]) -> list[BoundBatch]:
        """The batches of a piece, with their seeds, which the first piece of a step draws."""
        for b in batches:
            if not b.rounds:
                continue
            places = self._find_places() if self._places is None else self._places
            self._seeds = self._seeds or [draw_seed() for _ in range(self._count)]
            params = b.batch.weights
            b.seed = self._seeds[places[params[0]][0]]
            if b.batch.streams is None:
                streams = torch.tensor([places[p][1] for p in params], dtype=torch.int32)
                b.batch.streams = streams.to(b.device)
        return batches

    def _find_places(self) -> dict[Tensor, tuple[int, int]]:
        optimizer = self._optimizer
        groups, states = optimizer.param_groups, optimizer.state
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        rounding = [
            [groups[number]["params"][i] for i in indices]
            for number, key, indices in optimizer.planner.check(
                groups, states, {p: p.detach() for p in params}
            )
            if groups[number]["stochastic_rounding"] and key.dtypes.weight == torch.bfloat16
        ]
        self._count = len(rounding)
        self._places = {
            p: (number, i) for number, batch in enumerate(rounding) for i, p in enumerate(batch)
        }
        return self._places
