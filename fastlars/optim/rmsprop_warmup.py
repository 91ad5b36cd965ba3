"""RMSpropWarmup: RMSprop that turns into stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer, Params
from fastlars.optim.options import documented, from_arguments
from fastlars.optim.stepper import SkipIf
from fastlars.rules import RmspropWarmupRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@documented
class RMSpropWarmup(FusedOptimizer):
    """RMSprop for the first epochs, then little by little SGD with momentum.

    A step computes::

        d = g + wd w
        v = beta2 v + (1 - beta2) d^2
        b = mu b + a d + (1 - a) (lr_rmsprop / lr) d / (sqrt(v) + eps)
        w = w - lr b

    Akiba, Suzuki, Fukuda, "Extremely Large Minibatch SGD: Training ResNet-50 on ImageNet in 15
    Minutes", 2017 (arXiv:1711.04325). w is a weight, g its gradient, v the mean of squares, b the
    momentum buffer, which is minus the paper's Delta. The share a of SGD, the paper's alpha_SGD,
    depends on t, the number of the parameter's step, counted from 1, and on c = ``center_steps``
    and p = ``period_steps``::

        a = exp(2 (t - 1 - c) / p) / 2    while t - 1 < c
        a = 1/2 + (t - 1 - c) / p         while t - 1 < c + p / 2
        a = 1                             from there on

    Once a is 1, v is neither read nor written, and a step is that of ``torch.optim.SGD``, with b
    for its momentum buffer. All parameters have the same rate: there is no trust ratio. The paper
    does not say whether g includes weight decay; here it does, as in its authors' framework,
    Chainer. v starts at 0 and is not corrected for that. docs/numerics.md explains all symbols.

    ``param_groups[i]["step"]`` is the number of steps that a group has taken, an int, for scripts
    that read it there. It is a tensor with ``capturable`` or where the device alone knows whether a
    step was skipped, and stands still inside ``torch.compile``. t is ``state[p]["step"]``.

    Args:
        params: parameters, or parameter groups such as ``fastlars.parameter_groups`` makes, in
            which biases and norms have no decay.
        lr: the learning rate of SGD, a number or a 1-element tensor, at least 0, default 0.1; the
            paper has 0.1 times batch / 256, times ``fastlars.schedules.slow_start``. At 0 the step
            has no RMSprop term. b holds RMSprop's terms divided by past rates, so that a rate which
            grows many times over within a few steps makes them too long; the paper's only falls.
        momentum: mu, the share of b that a step keeps, in [0, 1), default 0.9 as in the paper.
        weight_decay: wd, the pull of weights towards 0, at least 0, default 0. 1e-4 is usual for
            ResNet-50; raise it against overfitting.
        center_steps: c, after how many steps both terms have half the weight, finite and at least
            0. In the paper 10 epochs; raise it where training still diverges when SGD sets in.
        period_steps: p, the width of the transition in steps, finite and above 0: its linear part
            takes p / 2. In the paper 5 epochs. The transition must end within 2^24 steps.
        lr_rmsprop: the learning rate of RMSprop, at least 0, default 3e-4, the paper's. Lower it
            where the first epochs diverge.
        square_decay: beta2, the share of v that a step keeps, in [0, 1), default 0.99. Raise it to
            average over more steps.
        eps: outside the square root, above 0, default 1e-8. Raise it to damp the RMSprop term where
            v is tiny.
        transition: ``"smooth"`` (default) as above, where value and slope of a are continuous, or
            ``"printed"``, with 2 (t - 1 - c) / p in the second line, as in the paper. There a goes
            on to 1.5, and 1 - a below 0, before it falls back to 1; here it ends at 1, after p / 4.
        {shared options}

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> w = torch.nn.init.ones_(model.weight)
        >>> epoch = 40  # steps; of ImageNet at a batch of 32,768
        >>> optimizer = fastlars.RMSpropWarmup(
        ...     model.parameters(), lr=6.4, center_steps=10 * epoch, period_steps=5 * epoch
        ... )
        >>> model(torch.ones(1, 4)).sum().backward()  # all gradients are 1: v = 0.01
        >>> optimizer.step()  # a = exp(-4) / 2, so that b = 0.00916 + 0.99084 * 4.6875e-5 / 0.1
        >>> round(optimizer.state[w]["momentum_buffer"][0, 0].item(), 6), round(w[0, 0].item(), 6)
        (0.009622, 0.938417)
    """

    rule = RmspropWarmupRule
    own_options = frozenset({"center_steps", "period_steps", "lr_rmsprop"})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        center_steps: float,
        period_steps: float,
        lr_rmsprop: float = 3e-4,
        square_decay: float = 0.99,
        eps: float = 1e-8,
        transition: Literal["smooth", "printed"] = "smooth",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype = torch.float32,
        capturable: bool = False,
        fused_unscale: bool | None = None,
        norm_group: ProcessGroup | DeviceMesh | None = None,
        skip_if: SkipIf | None = None,
    ) -> None:
        super().__init__(params, from_arguments(), norm_group, skip_if)
