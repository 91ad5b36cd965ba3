"""Bugs of single torch releases that tests meet, each found by a probe of torch alone."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn


@cache
def flatten_fails_after_compiled_group_norm() -> bool:
    """torch 2.14: GroupNorm that "aot_eager" compiled keeps images channels_last.

    The graph was traced with a contiguous output, and the `view` that Flatten was traced to raises.
    """
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten())
    images = torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last)
    try:
        torch.compile(net, backend="aot_eager")(images)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return True
    return False
