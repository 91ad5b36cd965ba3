"""Shards, and the global norm over processes, on a device without float64: test_no_float64.py."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlars


def step_shards() -> list[tuple[Tensor, Tensor]]:
    """In one of two processes: its shards after three steps, and those parts of whole tensors."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    from backends.no_float64_device import DEVICE, on_cpu  # makes the device, in this process alone

    group = dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, DEVICE.type)
    rank, found = dist.get_rank(), []
    reduce = dist.all_reduce
    dist.all_reduce = lambda value, **given: reduce(on_cpu(value), **given)

    def shard(whole: Tensor) -> Any:
        local = whole.chunk(2)[rank].clone().to(DEVICE)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    for kind, options in ((fastlars.LARS, {}), (fastlars.LAMB, {"max_grad_norm": 0.5})):
        torch.manual_seed(5)
        twins = [nn.Parameter(torch.randn(n)) for n in (8, 600)]
        params = [nn.Parameter(shard(twin.detach())) for twin in twins]
        optimizers = [kind(each, lr=0.25, weight_decay=0.1, **options) for each in (twins, params)]
        for _ in range(3):
            for twin, p in zip(twins, params, strict=True):
                twin.grad = torch.randn(twin.shape)
                p.grad = shard(twin.grad)
            for optimizer in optimizers:
                optimizer.step()
        for twin, p in zip(twins, params, strict=True):
            local: Any = p.detach()
            found.append((local.to_local().cpu(), twin.detach().chunk(2)[rank].clone()))
    weight = nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = fastlars.LAMB([weight], lr=0.25, max_grad_norm=math.inf, norm_group=mesh)
    weight.grad = torch.full((4,), 2.0, device=DEVICE) if rank else None
    optimizer.step()
    norm = optimizer.grad_norm
    assert norm is not None
    found.append((norm.cpu(), torch.tensor(4.0, dtype=torch.float64)))
    return found
