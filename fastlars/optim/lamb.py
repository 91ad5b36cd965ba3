"""LAMB: layer-wise adaptive moments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer, Params
from fastlars.optim.checkpoint import ForeignOptimizer
from fastlars.optim.options import documented, from_arguments
from fastlars.optim.stepper import SkipIf
from fastlars.rules import LambRule, Rule, pair

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@documented
class LAMB(FusedOptimizer):
    r"""LAMB: Adam's direction, every layer's step in proportion to the norm of its weights.

    .. math::
        m &= \beta_1 m + (1 - \beta_1) g, \quad v = \beta_2 v + (1 - \beta_2) g^2 \\
        r &= \frac{m}{1 - \beta_1^t} \Big/
             \Big(\sqrt{\frac{v}{1 - \beta_2^t}} + \epsilon\Big), \quad u = r + \lambda w \\
        w &= w - \gamma \frac{\phi(|w|)}{|u|} u

    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020
    (`arXiv:1904.00962 <https://arxiv.org/abs/1904.00962>`_). Norms are of one parameter tensor
    each. Where a norm is 0, the ratio is 1. t counts the steps of each parameter by itself.
    Other libraries' forms are in :mod:`fastlars.conventions`.

    ``param_groups[i]["step"]`` is the number of steps that a group has taken, an int, for scripts
    that read it there. It is a tensor with ``capturable`` or where the device alone knows whether a
    step was skipped, and stands still inside ``torch.compile``. t above is ``state[p]["step"]``.

    Args:
        params: parameters or parameter groups; see :func:`fastlars.parameter_groups`.
        lr: learning rate :math:`\gamma \ge 0`, a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the square root.
        weight_decay: :math:`\lambda \ge 0`.
        bias_correction: True as above; False leaves the two corrections out; ``"rate"`` divides
            the learning rate by :math:`1 - \beta_1^t` instead (pytorch_optimizer).
        grad_averaging: False lets :math:`g` enter m with weight 1 instead of :math:`1 - \beta_1`.
        decay: where :math:`\lambda` enters: ``"update"`` as above; ``"decoupled"``:
            :math:`w = (1 - \gamma \lambda) w` before all else and u = r; ``"gradient"``:
            :math:`g + \lambda w` in place of g (apex with ``adam_w_mode=False``).
        phi: (lower, upper): :math:`\phi(z) = \min(\max(z, lower), upper)`.
        ratio_eps: :math:`\ge 0`, added to :math:`|u|` in the ratio.
        trust_clip: LAMBC: no ratio above 1.
        adapt: False sets the ratio to 1: AdamW.
        always_adapt: False sets the ratio to 1 in groups without weight decay, as apex and timm do.
            NVLAMB is ``always_adapt=True, max_grad_norm=1.0``.
        {shared options}

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 2)
        >>> groups = fastlars.parameter_groups(model, weight_decay=0.01)
        >>> optimizer = fastlars.LAMB(groups, lr=2e-3)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    rule = LambRule
    own_options = frozenset({"phi", "ratio_eps"})
    loads_from = (
        ForeignOptimizer(
            keys=frozenset({"betas", "amsgrad", "differentiable"}),
            states=("exp_avg", "exp_avg_sq", "step"),
            refused=("max_exp_avg_sq",),
        ),
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool | Literal["rate"] = True,
        grad_averaging: bool = True,
        decay: Literal["update", "decoupled", "gradient"] = "update",
        phi: tuple[float, float] = (0.0, math.inf),
        ratio_eps: float = 0.0,
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
        super().__init__(params, from_arguments(), norm_group, skip_if)

    @classmethod
    def rule_of(cls, group: dict[str, Any]) -> Rule:
        corrections: dict[Any, str] = {True: "moments", False: "none", "rate": "rate"}
        correction = group["bias_correction"]
        if correction not in corrections:
            raise ValueError(f'bias_correction must be True, False or "rate", got {correction!r}')
        beta1, beta2 = pair("betas", group["betas"])
        lower, upper = pair("phi", group["phi"])
        values = {"beta1": beta1, "beta2": beta2, "lower": lower, "upper": upper}
        return super().rule_of({**group, **values, "bias_correction": corrections[correction]})
