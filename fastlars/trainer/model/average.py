"""An exponential moving average of the model, to be evaluated in its place."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """A copy that ``update_parameters(model)`` moves by 1 - `decay` towards the model.

    The first update makes it equal to the model. Batch norm's statistics are averaged as the
    weights are: those of the latest weights alone would not suit them.

    Args:
        decay: from 0 to below 1; 0 for no average, and None.
    """
    if not decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
