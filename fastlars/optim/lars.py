"""LARS: layer-wise adaptive rate scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer, Params
from fastlars.optim.checkpoint import ForeignOptimizer
from fastlars.optim.options import documented, from_arguments
from fastlars.optim.stepper import SkipIf
from fastlars.rules import LarsRule, Rule, adapts, flag, real

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
    r"""LARS: every layer takes a step in proportion to the norm of its weights.

    .. math::
        q &= \eta \, |w| / (|g| + \lambda |w| + \epsilon) \\
        v &= \mu v + \gamma q (g + \lambda w) \\
        w &= w - v

    You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017
    (`arXiv:1708.03888 <https://arxiv.org/abs/1708.03888>`_), Algorithm 1 with the coefficient of
    eq. 6. Norms are of one parameter tensor each. Where a norm is 0, q is 1. Other libraries'
    forms are in :mod:`fastlars.conventions`.

    Args:
        params: parameters or parameter groups; see :func:`fastlars.parameter_groups`.
        lr: learning rate :math:`\gamma \ge 0`, a number or a 1-element tensor. Large: 5 to 30 is
            usual with the default trust coefficient. None, where each group has an ``lr`` itself; a
            group without one is a TypeError.
        momentum: :math:`\mu`, in [0, 1). Without momentum there is no buffer.
        dampening: in [0, 1]; what enters the buffer is multiplied by ``1 - dampening``, from the
            second step on, as in :class:`torch.optim.SGD`.
        weight_decay: :math:`\lambda \ge 0`.
        nesterov: step along :math:`\gamma q d + \mu v` instead of :math:`v`.
        trust_coefficient: :math:`\eta \ge 0`.
        eps: :math:`\epsilon \ge 0`, added to the denominator of q.
        ratio: ``"separate"`` as above, or ``"combined"``:
            :math:`q = \eta |w| / (|g + \lambda w| + \epsilon)`.
        buffer: what the momentum buffer holds, with d the decayed gradient: ``"step"``
            (:math:`\gamma q d`, as above), ``"scaled"`` (:math:`q d`, the learning rate outside),
            or ``"gradient"`` (:math:`d`, both outside).
        momentum_correction: multiply a ``"step"`` buffer by :math:`\gamma_t / \gamma_{t-1}` when
            the learning rate changes (Goyal et al. 2017, remark 2). Equal to ``"scaled"`` then, as
            long as no rate is 0, which empties the buffer.
        trust_clip: LARC: :math:`q = \min(q / \gamma, 1)`, so that no layer exceeds the global rate.
        adapt: False sets q = 1: stochastic gradient descent with momentum.
        always_adapt: False sets q = 1 in groups without weight decay, as timm does.
        {shared options}

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 2)
        >>> groups = fastlars.parameter_groups(model, weight_decay=1e-4)
        >>> optimizer = fastlars.LARS(groups, lr=5.0)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
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
        """The optimizer itself: scripts for apex's LARC and torchlars read ``optim.param_groups``
        of the optimizer that those wrap.
        """
        return self

    @classmethod
    def rule_of(cls, group: dict[str, Any]) -> Rule:
        # A schedule may take the momentum to 0, where there is nothing to look ahead to.
        has_momentum = real("momentum", group["momentum"]) != 0.0
        nesterov = flag("nesterov", group["nesterov"]) and has_momentum
        return super().rule_of({**group, "nesterov": nesterov})
