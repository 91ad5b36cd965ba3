"""LANS: LAMB with normalized gradients and Nesterov's momentum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer, Params
from fastlars.optim.options import documented, from_arguments
from fastlars.optim.stepper import SkipIf
from fastlars.ranges import pair
from fastlars.rules import LansRule, Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@documented
class LANS(FusedOptimizer):
    """LANS: LAMB with each gradient divided by its norm, and a Nesterov-like update.

    A step computes::

        g = g / (|g| + norm_eps)
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        d = sqrt(v / (1 - beta2^t)) + eps
        r = (m / (1 - beta1^t)) / d + wd w
        c = g / d + wd w
        q_r = phi(|w|) / |r|
        q_c = phi(|w|) / |c|
        w = w - lr (beta1 q_r r + (1 - beta1) q_c c)

    Zheng, Lin, Zha, Li, "Accelerated Large Batch Optimization of BERT Pretraining in 54 minutes",
    2020 (arXiv:2006.13484). w is a weight, g its gradient, m and v the moments, r the direction of
    the momentum and c that of the gradient; ``|x|`` is the 2-norm of one parameter tensor. Each
    direction has a trust ratio, q_r and q_c, which is 1 where one of its norms is 0. t is
    ``state[p]["step"]``, the steps of each parameter by itself. docs/numerics.md explains all
    symbols.

    The gradient's scale drops out of a step, unless ``norm_eps`` is above 0 or ``normalize_grad``
    is False: a clip or a loss scale changes only roundings. ``trust_ratios()`` has the momentum's
    ratio, q_r. ``param_groups[i]["step"]`` is the number of steps that a group has taken, as in
    ``fastlars.LAMB``, which cannot take over LANS's states: these moments are of normalized
    gradients.

    Args:
        params: parameters, or parameter groups such as ``fastlars.parameter_groups`` makes, in
            which biases and norms have neither decay nor ratios; their gradients are normalized.
        lr: the learning rate, a number or a 1-element tensor, at least 0, default 1e-3: the length
            of a step relative to the weights.
        betas: (beta1, beta2), the shares of m and v that a step keeps, each in [0, 1), default
            (0.9, 0.999). beta1 also weighs the two directions.
        eps: outside the square root, at least 0, default 1e-6. An element of a normalized gradient
            is about one over the square root of the tensor's size: keep eps well below that.
        weight_decay: wd, the pull of weights towards 0, at least 0, default 0. 0.01 is usual for
            BERT.
        normalize_grad: False leaves gradients as they are. Default True.
        norm_eps: added to ``|g|``, at least 0, default 0. Change it only to match gluon-nlp, which
            has 1e-6.
        bias_correction: True (default) as above. False leaves both corrections out.
        grad_averaging: False lets g enter m, and c the update, with weight 1 instead of 1 - beta1.
            Default True. Change it only to match a run of gluon-nlp that has it.
        decay: where weight decay enters. ``"update"`` (default): in r and c, as above.
            ``"gradient"``: g + wd w in place of the normalized g, as gluon-nlp with
            ``adam_w_mode=False``.
        phi: (lower, upper), the bounds of phi(z) = min(max(z, lower), upper), lower at least 0,
            upper above 0 and at least lower. Default (0, infinity), no bounds.
        adapt: False sets both ratios to 1. Default True. Usually set for a group, as
            ``fastlars.parameter_groups`` does for biases and norms.
        always_adapt: False sets both ratios to 1 in groups without weight decay. Default True, as
            in gluon-nlp.
        {shared options}

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> w = torch.nn.init.ones_(model.weight)
        >>> groups = fastlars.parameter_groups(model, weight_decay=0.5)
        >>> optimizer = fastlars.LANS(groups, lr=0.01)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).sum().backward()  # all gradients are 1, normalized 0.5
        ...     optimizer.step()
        ...     print(round(optimizer.trust_ratios()[w], 4), round(w[0, 0].item(), 4))
        0.6667 0.99
        0.6622 0.9801
    """

    rule = LansRule
    own_options = frozenset({"normalize_grad", "norm_eps"})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        normalize_grad: bool = True,
        norm_eps: float = 0.0,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        decay: Literal["update", "gradient"] = "update",
        phi: tuple[float, float] = (0.0, math.inf),
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
        super().__init__(params, from_arguments(), norm_group, skip_if)

    @classmethod
    def rule_of(cls, group: dict[str, Any]) -> Rule:
        beta1, beta2 = pair("betas", group["betas"])
        lower, upper = pair("phi", group["phi"])
        values = {"beta1": beta1, "beta2": beta2, "lower": lower, "upper": upper}
        return super().rule_of({**group, **values})
