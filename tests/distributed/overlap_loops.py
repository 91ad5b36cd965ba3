"""One training loop with overlap and without, in the same processes, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import Result, count_early, images
from distributed.processes import run

MANY = {"bucket_cap_mb": 0.001}
Loop = Callable[[bool, str], Result]


def both(loop: Loop, mode: str) -> list[list[Result]]:
    return [loop(overlapped, mode) for overlapped in (False, True)]


def same(loop: Loop, mode: str = "step", size: int = 2) -> list[Result]:
    """The overlapped runs' results."""
    found = run(size, both, loop, mode)
    for plain, overlapped in found:
        overlapped.assert_same(plain)
        overlapped.losses, found[0][0].losses = [], []
        overlapped.assert_same(found[0][0])
    return [overlapped for _, overlapped in found]


def start(
    net: nn.Module, overlapped: bool, mode: str, params: Any = None, **ddp: Any
) -> tuple[DistributedDataParallel, Any]:
    module = DistributedDataParallel(net, **{**MANY, **ddp})
    params = list(net.parameters()) if params is None else params
    optimizer = fastlars.LAMB(params, lr=0.05, weight_decay=1e-3)
    if overlapped:
        fastlars.distributed.overlap(module, optimizer, mode=mode)
    return module, optimizer


def loss_of(module: nn.Module, step: int) -> Tensor:
    x, y = images(step, dist.get_rank(), torch.float32)
    return nn.functional.cross_entropy(module(x), y)


def loop(
    module: nn.Module,
    optimizer: Any,
    steps: int = 5,
    loss: Callable[[nn.Module, int], Tensor] = loss_of,
) -> list[int]:
    early = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(module, step).backward()
        early.append(count_early(optimizer))
        optimizer.step()
    return early
