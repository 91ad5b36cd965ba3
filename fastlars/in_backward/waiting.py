"""Waiting: parameters whose gradients are complete, until enough of them are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlars.optim.dtensor import local_tensor


class Waiting:
    """Parameters in the order in which their gradients arrived, with what is to be known of these.

    Attributes:
        nbytes: of the gradients.
    """

    def __init__(self) -> None:
        self._params: dict[Tensor, None] = {}
        self._streams: set[Any] = set()  # of a GPU, on which the gradients are computed
        self.nbytes = 0

    def add(self, p: Tensor) -> None:
        """The gradient of ``p`` has arrived."""
        assert p.grad is not None
        self._params[p] = None
        self.nbytes += p.grad.numel() * p.grad.element_size()  # sparse ones have no nbytes
        if not p.is_cpu:
            self._streams.add(torch.accelerator.current_stream(p.device))

    def take(self) -> list[Tensor]:
        """The parameters, which then no longer wait. The current stream waits for gradients that
        autograd computes on others; and their memory is not used again before it has read them."""
        params = list(self._params)
        if self._streams:
            current = torch.accelerator.current_stream(params[0].device)
            for other in self._streams - {current}:
                current.wait_stream(other)
                for g in (p.grad for p in params if p.grad is not None):
                    local_tensor(g).record_stream(current)
        self._params.clear()
        self._streams.clear()
        self.nbytes = 0
        return params
