"""LARS and LAMB in torch._foreach operations for torch.compile: what can be had without kernels.

The rules are fastlars's defaults, in as few operations as they take, and nothing else: no groups,
no checks. :class:`Compiled` makes an optimizer of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Tensors = list[Tensor]
Rule = Callable[[Tensors, Tensors, list[Tensors], Tensor, float, float], None]


def _ratios(weights: Tensors, updates: Tensors, decay: float, coefficient: float) -> Tensors:
    norms = zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True)
    return [
        torch.where((w > 0) & (u > 0), coefficient * w / (u + decay * w), 1.0) for w, u in norms
    ]


def lars(
    weights: Tensors, grads: Tensors, states: list[Tensors], step: Tensor, lr: float, decay: float
) -> None:
    """One step of LARS, the paper's Algorithm 1; ``states`` is the momentum."""
    (momenta,) = states
    rates = [lr * q for q in _ratios(weights, grads, decay, 1e-3)]
    steps = torch._foreach_mul(torch._foreach_add(grads, weights, alpha=decay), rates)
    torch._foreach_mul_(momenta, 0.9)
    torch._foreach_add_(momenta, steps)
    torch._foreach_sub_(weights, momenta)


def lamb(
    weights: Tensors, grads: Tensors, states: list[Tensors], step: Tensor, lr: float, decay: float
) -> None:
    """One step of LAMB with bias correction; ``states`` are the two moments."""
    first, second = states
    torch._foreach_lerp_(first, grads, 0.1)
    torch._foreach_mul_(second, 0.999)
    torch._foreach_addcmul_(second, grads, grads, 0.001)
    one, two = 1 - 0.9**step, (1 - 0.999**step).sqrt()
    # A division by a list of 0-dim tensors, since the number is on the device.
    roots = torch._foreach_div(torch._foreach_sqrt(second), [two] * len(second))
    torch._foreach_add_(roots, 1e-6)
    updates = torch._foreach_div(torch._foreach_div(first, [one] * len(first)), roots)
    torch._foreach_add_(updates, weights, alpha=decay)
    rates = [lr * q for q in _ratios(weights, updates, 0.0, 1.0)]
    torch._foreach_sub_(weights, torch._foreach_mul(updates, rates))


STATES = {lars: 1, lamb: 2}


class Compiled(torch.optim.Optimizer):
    """An optimizer whose step is one call of a compiled rule."""

    def __init__(self, params: list[nn.Parameter], rule: Rule, lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})
        self._params = params
        self._weights = [p.detach() for p in params]
        self._states = [[torch.zeros_like(w) for w in self._weights] for _ in range(STATES[rule])]
        self._count = torch.zeros((), device=params[0].device)
        # Sizes are constants: a model steps the same parameters for ever.
        self._rule = torch.compile(rule, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        self._count += 1
        grads = [p.grad for p in self._params]
        self._rule(self._weights, grads, self._states, self._count, group["lr"], group["decay"])
