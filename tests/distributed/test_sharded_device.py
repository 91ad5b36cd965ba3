"""Shards on the device of their mesh: sums, masks and rows stay there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlars
from distributed.processes import run
from tolerances import assert_close

OPTIMIZERS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (fastlars.LARS, {"lr": 0.5, "trust_coefficient": 0.1, "weight_decay": 0.01}),
    (fastlars.LAMB, {"lr": 0.05, "weight_decay": 0.01, "max_grad_norm": 0.5}),
)


def step_shards(device: str) -> list[tuple[Tensor, Tensor]]:
    """Shards after three steps, and the same parts of whole CPU tensors."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    # init_device_mesh would make a group of its own, with NCCL for what lies on GPUs.
    group = dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, device)
    placements = [Shard(0), Shard(1), Replicate()]

    def spread(values: list[Tensor]) -> list[Any]:
        return [
            distribute_tensor(value.to(device), mesh, [placement], src_data_rank=None)
            for value, placement in zip(values, placements, strict=True)
        ]

    found = []
    for optimizer_class, options in OPTIMIZERS:
        torch.manual_seed(5)
        twins = [nn.Parameter(torch.randn(size)) for size in ((5, 3), (3, 6), (7,))]
        params = [nn.Parameter(p) for p in spread([t.detach() for t in twins])]
        reference = optimizer_class(twins, **options)
        optimizer = optimizer_class(params, **options)
        for _ in range(3):
            for twin in twins:
                twin.grad = torch.randn(twin.shape)
            for p, grad in zip(params, spread([t.grad for t in twins]), strict=True):
                p.grad = grad
            reference.step()
            optimizer.step()
        parts = [
            twin.detach().chunk(2, dim)[dist.get_rank()]
            for twin, dim in ((twins[0], 0), (twins[1], 1))
        ]
        for p, part in zip(params, [*parts, twins[2].detach()], strict=True):
            found.append((p.detach().to_local().cpu(), part.contiguous()))
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_shards_step_as_parts_of_whole_tensors(device: str) -> None:
    # On one GPU both processes share it, through gloo: NCCL wants one each.
    for found in run(2, step_shards, device):
        for i, (shard, part) in enumerate(found):
            assert_close(f"shard {i}", "weight", shard, part, float(part.abs().max()))
