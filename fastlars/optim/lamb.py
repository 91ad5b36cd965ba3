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
from fastlars.ranges import pair
from fastlars.rules import LambRule, Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


# What True, False and one more word stand for in the rule.
_WORDS: dict[str, dict[Any, str]] = {
    "bias_correction": {True: "moments", False: "none", "rate": "rate"},
    "nesterov": {True: "first", False: "none", "both": "both"},
}


def _word(name: str, value: Any) -> str:
    try:
        return _WORDS[name][value]
    except (KeyError, TypeError):
        other = [*_WORDS[name]][-1]
        raise ValueError(f'{name} must be True, False or "{other}", got {value!r}') from None


@documented
class LAMB(FusedOptimizer):
    """LAMB: Adam's direction, every layer's step in proportion to the norm of its weights.

    A step computes::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        r = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        u = r + wd w
        q = phi(|w|) / |u|
        w = w - lr q u

    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020
    (arXiv:1904.00962). w is a weight, g its gradient, m and v the moments, q the trust ratio;
    ``|x|`` is the 2-norm of one parameter tensor. Where a norm is 0, q is 1. t is
    ``state[p]["step"]``, the steps of each parameter by itself. docs/numerics.md explains all
    symbols; ``fastlars.conventions`` has the forms of other libraries.

    ``param_groups[i]["step"]`` is the number of steps that a group has taken, an int, for scripts
    that read it there. It is a tensor with ``capturable`` or where the device alone knows whether a
    step was skipped, and stands still inside ``torch.compile``.

    Args:
        params: parameters, or parameter groups such as ``fastlars.parameter_groups`` makes, in
            which biases and norms have neither decay nor ratio.
        lr: the learning rate, a number or a 1-element tensor, at least 0, default 1e-3: the length
            of a step relative to the weights. The paper scales it with the square root of the
            batch.
        betas: (beta1, beta2), the shares of m and v that a step keeps, each in [0, 1), default
            (0.9, 0.999). Lower beta2, to 0.95 for example, where the scale of gradients changes
            quickly.
        eps: outside the square root, at least 0, default 1e-6. Raise it to damp the direction where
            v is tiny.
        weight_decay: wd, the pull of weights towards 0, at least 0, default 0. 0.01 is usual for
            BERT; raise it against overfitting.
        bias_correction: True (default) as above. False leaves both corrections out, so that first
            steps are not those of Adam. ``"rate"`` divides lr by 1 - beta1^t instead, as
            pytorch_optimizer does.
        grad_averaging: False lets g enter m with weight 1 instead of 1 - beta1. Default True.
            Change it only to match a run of apex or timm that has it.
        nesterov: True is N-LAMB, ``"both"`` NN-LAMB, of the paper's appendix: the first moment, or
            both, look one step ahead, as in Nadam. Default False. In r they are::

                m^ = beta1 m / (1 - beta1^(t+1)) + (1 - beta1) g / (1 - beta1^t)
                v^ = beta2 v / (1 - beta2^t)                                           N-LAMB
                v^ = beta2 v / (1 - beta2^(t+1)) + (1 - beta2) g^2 / (1 - beta2^t)     NN-LAMB

            The appendix has beta1 = 0.975. ``bias_correction=False`` leaves out all
            denominators, and ``"rate"`` is refused, as one factor cannot correct both terms; with
            ``grad_averaging=False`` g has weight 1 here too; with ``decay="gradient"`` it is the
            decayed gradient. A step reads the gradients once more where it takes two passes.
        decay: where weight decay enters. ``"update"`` (default): in u, as above. ``"decoupled"``:
            w = (1 - lr wd) w before all else, and u = r. ``"gradient"``: g + wd w in place of g, as
            apex with ``adam_w_mode=False``.
        phi: (lower, upper), the bounds of phi(z) = min(max(z, lower), upper), lower at least 0,
            upper above 0 and at least lower. Default (0, infinity), no bounds. Some libraries have
            (0, 10), against long steps of large layers.
        ratio_eps: added to ``|u|`` in q, at least 0, default 0. Change it only to match
            pytorch_optimizer, which has 1e-6.
        ratio_bounds: (floor, ceiling) of q, floor at least 0, ceiling above 0 and at least floor.
            Default (0, infinity), no bounds. The q of 1 where a norm is 0 stays. DeepSpeed has
            (0.01, 10). (0, ceiling) is LAMBC (Fong et al. 2020, arXiv:2011.05556), against long
            steps where u is short.
        trust_clip: True is LAMBC with a ceiling of 1, as timm has it: no q above 1, whatever the
            floor. Default False. Set it where early steps diverge.
        adapt: False sets q = 1, which is AdamW. Default True. Usually set for a group, as
            ``fastlars.parameter_groups`` does for biases and norms.
        always_adapt: False sets q = 1 in groups without weight decay, as apex and timm do. Default
            True. NVLAMB is ``always_adapt=True, max_grad_norm=1.0``.
        {shared options}

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> w = torch.nn.init.ones_(model.weight)
        >>> groups = fastlars.parameter_groups(model, weight_decay=0.5)
        >>> optimizer = fastlars.LAMB(groups, lr=0.01)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).sum().backward()  # all gradients are 1, so that r = 1
        ...     optimizer.step()
        ...     print(round(optimizer.trust_ratios()[w], 4), round(w[0, 0].item(), 4))
        0.6667 0.99
        0.6622 0.9801
    """

    rule = LambRule
    own_options = frozenset({"ratio_eps"})
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
        nesterov: bool | Literal["both"] = False,
        decay: Literal["update", "decoupled", "gradient"] = "update",
        phi: tuple[float, float] = (0.0, math.inf),
        ratio_eps: float = 0.0,
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
        super().__init__(params, from_arguments(), norm_group, skip_if)

    @classmethod
    def rule_of(cls, group: dict[str, Any]) -> Rule:
        beta1, beta2 = pair("betas", group["betas"])
        lower, upper = pair("phi", group["phi"])
        floor, ceiling = pair("ratio_bounds", group["ratio_bounds"])
        values = {"beta1": beta1, "beta2": beta2, "lower": lower, "upper": upper}
        values |= {"ratio_floor": floor, "ratio_ceiling": ceiling}
        words = {name: _word(name, group[name]) for name in _WORDS}
        return super().rule_of({**group, **values, **words})
