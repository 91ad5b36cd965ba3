"""Whole states of another library, for a model that FSDP2 has sharded since."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastlars
from distributed.processes import run
from fastlars import conventions, migrate
from tolerances import assert_same_bits


def buffers() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(7, 5), (7,), (3, 7), (3,)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def loaded() -> list[Tensor]:
    """What every parameter's momentum buffer is after loading, gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    groups = fastlars.parameter_groups(model, weight_decay=1e-4)
    optimizer = fastlars.LARS(groups, lr=1.0, **conventions.vicreg_lars)
    group = {"lr": 1.0, "momentum": 0.9, "params": [0, 1, 2, 3]}
    state: dict[int, Any] = {i: {"mu": buffer} for i, buffer in enumerate(buffers())}
    old = {"state": state, "param_groups": [group]}
    migrate.load(optimizer, old, conventions.vicreg_lars, params=model.parameters())
    found = [optimizer.state[p]["momentum_buffer"].full_tensor() for p in model.parameters()]
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return found


def test_each_process_takes_its_shards() -> None:
    for found in run(2, loaded):
        for actual, expected in zip(found, buffers(), strict=True):
            assert_same_bits("buffer", actual, expected)
