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
    r"""RMSprop for the first epochs, then little by little SGD with momentum.

    .. math::
        g &= g + \lambda w, \quad m = \mu_2 m + (1 - \mu_2) g^2 \\
        b &= \mu_1 b + \Big( \alpha_\text{SGD} +
             \frac{\alpha_\text{RMSprop}}{\sqrt m + \epsilon} \Big) g, \quad w = w - \gamma b \\
        \alpha_\text{RMSprop} &= (1 - \alpha_\text{SGD}) \, \gamma_\text{RMSprop} / \gamma

    Akiba, Suzuki, Fukuda, "Extremely Large Minibatch SGD: Training ResNet-50 on ImageNet in 15
    Minutes", 2017 (`arXiv:1711.04325 <https://arxiv.org/abs/1711.04325>`_), with b for minus the
    paper's :math:`\Delta`. The share :math:`\alpha_\text{SGD}` depends on t, the steps that a
    parameter has taken, the center c and the period p:

    .. math::
        \alpha_\text{SGD} = \begin{cases}
            \frac12 \exp(2 (t - c) / p) & t < c \\
            \frac12 + (t - c) / p & c \le t < c + p / 2 \\
            1 & \text{otherwise} \end{cases}

    From there on m is neither read nor written, and a step is that of :class:`torch.optim.SGD`,
    with b for its momentum buffer. Each parameter has the same rate: no trust ratio is taken. The
    paper does not say whether g includes weight decay; here it does, as in its authors' framework,
    Chainer. m starts at 0 and is not corrected for that.

    ``param_groups[i]["step"]`` is the number of steps that a group has taken, an int, for scripts
    that read it there. It is a tensor with ``capturable`` or where the device alone knows whether a
    step was skipped, and stands still inside ``torch.compile``. t above is ``state[p]["step"]``.

    Args:
        params: parameters or parameter groups; see :func:`fastlars.parameter_groups`.
        lr: learning rate :math:`\gamma \ge 0` of SGD, a number or a 1-element tensor. At 0 the step
            has no RMSprop term. b holds :math:`\gamma_\text{RMSprop} / \gamma` of steps past, so
            that a rate which grows many times over within some steps makes these too long; the
            paper's only falls.
        momentum: :math:`\mu_1`, in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        center_steps: c, in steps, finite and :math:`\ge 0`: where both terms have half the weight.
            In the paper 10 epochs.
        period_steps: p, in steps, finite and positive. In the paper 5 epochs. The transition must
            end within :math:`2^{24}` steps.
        lr_rmsprop: :math:`\gamma_\text{RMSprop} \ge 0`, the learning rate of RMSprop.
        square_decay: :math:`\mu_2`, in [0, 1).
        eps: :math:`\epsilon > 0`, outside the square root.
        transition: ``"smooth"`` as above, where value and slope are continuous; ``"printed"``: with
            :math:`2 (t - c) / p` in the second line, as in the paper. There it goes on to 1.5, and
            :math:`\alpha_\text{RMSprop}` below 0, before it falls back to 1; here it ends at 1,
            after p / 4.
        {shared options}

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 2)
        >>> groups = fastlars.parameter_groups(model, weight_decay=1e-4)
        >>> epoch = 40  # steps; of ImageNet at a batch of 32,768
        >>> optimizer = fastlars.RMSpropWarmup(
        ...     groups, lr=6.4, center_steps=10 * epoch, period_steps=5 * epoch
        ... )
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
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
