"""optax under jax.jit as a contender: one compiled update of all parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn


class OptaxStep:
    """Steps copies of the parameters that jax owns, on its CPU.

    The old parameters and states are given away, as jax users do, so that the update need not
    allocate; a step ends when its results are there.
    """

    def __init__(self, params: list[nn.Parameter], name: str, lr: float, decay: float) -> None:
        import jax
        import optax

        def moved(values: Any, state: Any, grads: Any, rate: Any) -> Any:
            rule = getattr(optax, name)(rate, weight_decay=decay)
            updates, state = rule.update(grads, state, values)
            return optax.apply_updates(values, updates), state

        self._torch = params
        self._jax = jax
        self._move = jax.jit(moved, donate_argnums=(0, 1))
        self._values = [self._array(p.detach()) for p in params]
        self._grads = [self._array(p.grad) for p in params if p.grad is not None]
        self._state = getattr(optax, name)(lr, weight_decay=decay).init(self._values)
        self.param_groups = [{"lr": lr}]

    def _array(self, tensor: torch.Tensor) -> Any:
        # numpy's copy: jax would share torch's memory, and give it away with the old parameters.
        return self._jax.numpy.asarray(tensor.numpy().copy())

    def step(self) -> None:
        """One update."""
        rate = self.param_groups[0]["lr"]
        self._values, self._state = self._move(self._values, self._state, self._grads, rate)
        self._jax.block_until_ready((self._values, self._state))

    @torch.no_grad()
    def settle(self) -> None:
        """Write jax's parameters to torch's, where they are compared."""
        for p, value in zip(self._torch, self._values, strict=True):
            p.copy_(torch.from_numpy(np.array(value)))
