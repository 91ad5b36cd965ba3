"""LARS: layer-wise adaptive rate scaling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer, Params
from fastlars.optim.checkpoint import ForeignOptimizer
from fastlars.optim.options import documented, from_arguments
from fastlars.optim.stepper import SkipIf
from fastlars.ranges import flag, pair, real
from fastlars.rules import LarsRule, Rule, adapts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def _sgd_incompatibility(group: dict[str, Any]) -> str:
    exact = group["buffer"] == "gradient" or (group["buffer"] == "scaled" and not adapts(group))
    if exact:
        return ""
    return (
        "a torch.optim.SGD momentum buffer sums plain gradients, which is what LARS's holds with "
        'buffer="gradient", or with buffer="scaled" and adapt=False, but not with '
        f"buffer={group['buffer']!r}, adapt={group['adapt']}; fastlars.migrate.load takes those of "
        "LARC, torchlars and others around SGD"
    )


@documented
class LARS(FusedOptimizer):
    """LARS: every layer takes a step in proportion to the norm of its weights.

    A step computes::

        q = eta |w| / (|g| + wd |w| + eps)
        b = mu b + lr q (g + wd w)
        w = w - b

    You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017
    (arXiv:1708.03888), Algorithm 1 with the coefficient of eq. 6. w is a weight, g its gradient, b
    the momentum buffer, q the trust ratio; ``|x|`` is the 2-norm of one parameter tensor. Where a
    norm is 0, q is 1. docs/numerics.md explains all symbols; ``fastlars.conventions`` has the forms
    of other libraries.

    Args:
        params: parameters, or parameter groups such as ``fastlars.parameter_groups`` makes, in
            which biases and norms have neither decay nor ratio.
        lr: the learning rate, a number or a 1-element tensor, at least 0. It is large, since q is
            small: 5 to 30 is usual with the default ``trust_coefficient``. Default None, where
            every group has an ``lr``; a group without one is a TypeError.
        momentum: mu, the share of b that a step keeps, in [0, 1), default 0.9. MLPerf has about
            0.95 for batches of 32K and more. With 0 there is no buffer.
        dampening: tau, in [0, 1], default 0: from the second step on, what enters b is multiplied
            by 1 - tau, as in ``torch.optim.SGD``. Leave it at 0 unless a run to be reproduced has
            it.
        weight_decay: wd, the pull of weights towards 0, at least 0, default 0. The paper has 1e-4
            for ResNet-50; raise it against overfitting.
        nesterov: True steps along lr q d + mu b instead of b, where d = g + wd w. Default False.
            Needs a momentum and no dampening.
        trust_coefficient: eta, how long a step is relative to the weights at lr 1, at least 0,
            default 1e-3. Without ``trust_clip``, adapted layers depend only on the product lr eta:
            leave it at the default, and tune ``lr``.
        eps: in the denominator of q, at least 0, default 0. Raise it (1e-8 is usual) to bound q
            where gradients vanish.
        ratio: ``"separate"`` (default) as above, or ``"combined"``, whose denominator is
            ``|g + wd w| + eps``. Change it to match another library.
        buffer: what b sums up. ``"step"`` (default): lr q d, as above. ``"scaled"``: q d, with lr
            outside, so that a new lr acts on old gradients too. ``"gradient"``: d, with lr and q
            outside. Change it to match another library.
        momentum_correction: True multiplies a ``"step"`` buffer by the new lr over the old one when
            lr changes (Goyal et al. 2017, remark 2). Default False. It makes ``"step"`` equal to
            ``"scaled"``, as long as no lr is 0, which empties the buffer.
        ratio_bounds: (floor, ceiling) of q, floor at least 0, ceiling above 0 and at least floor.
            Default (0, infinity), no bounds. A ceiling keeps layers with tiny gradients from long
            steps, a floor keeps layers with large ones moving. The q of 1 where a norm is 0 stays.
        trust_clip: True is LARC: q = min(q / lr, 1), so that no layer's rate exceeds lr, whatever
            the floor: it comes after ``ratio_bounds``. Default False. Set it where early steps
            diverge.
        adapt: False sets q = 1, which is stochastic gradient descent with momentum. Default True.
            Usually set for a group, as ``fastlars.parameter_groups`` does for biases and norms.
        always_adapt: False sets q = 1 in groups without weight decay, as timm does. Default True.
        {shared options}

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> w = torch.nn.init.ones_(model.weight)
        >>> groups = fastlars.parameter_groups(model, weight_decay=0.5)
        >>> optimizer = fastlars.LARS(groups, lr=5.0)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).sum().backward()  # all gradients are 1: |w| = |g| = 2
        ...     optimizer.step()
        ...     print(round(optimizer.trust_ratios()[w], 6), round(w[0, 0].item(), 6))
        0.000667 0.995
        0.000664 0.985525
    """

    rule = LarsRule
    own_options = frozenset({"buffer", "ratio"})
    loads_from = (
        ForeignOptimizer(
            keys=frozenset({"momentum", "dampening", "nesterov", "differentiable"}),
            states=("momentum_buffer",),
            refused=(),
            incompatibility=_sgd_incompatibility,
        ),
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        ratio: Literal["separate", "combined"] = "separate",
        buffer: Literal["step", "scaled", "gradient"] = "step",
        momentum_correction: bool = False,
        ratio_bounds: tuple[float, float] = (0.0, math.inf),
        trust_clip: bool = False,
        adapt: bool = True,
        always_adapt: bool = True,
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
        if flag("nesterov", nesterov):
            LarsRule(momentum=momentum, dampening=dampening, nesterov=True)
        super().__init__(params, from_arguments(), norm_group, skip_if)

    @property
    def optim(self) -> LARS:
        """The optimizer itself, for scripts that read ``optimizer.optim.param_groups``.

        apex's LARC and torchlars keep the optimizer that they wrap under this name.
        """
        return self

    @classmethod
    def rule_of(cls, group: dict[str, Any]) -> Rule:
        # A schedule may take the momentum to 0, where there is nothing to look ahead to.
        has_momentum = real("momentum", group["momentum"]) != 0.0
        nesterov = flag("nesterov", group["nesterov"]) and has_momentum
        floor, ceiling = pair("ratio_bounds", group["ratio_bounds"])
        values = {"nesterov": nesterov, "ratio_floor": floor, "ratio_ceiling": ceiling}
        return super().rule_of({**group, **values})
