"""fastlars.logging where steps are overlapped or sharded: norms of whole layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.processes import run
from fastlars.logging import LayerStatistics, layer_statistics

Found = list[dict[str, LayerStatistics]]
KINDS = ["LARS", "LAMB", "LANS"]
STEPS = 4  # overlap leaves the first two to step()


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def trained(kind: str, model: nn.Module, ddp: nn.Module, **overlap: Any) -> Found:
    """Statistics of each step, of layers that are named as in ``model``."""
    groups = fastlars.parameter_groups(model, weight_decay=0.1)
    optimizer = getattr(fastlars, kind)(groups, lr=0.1)
    if overlap:
        fastlars.distributed.overlap(ddp, optimizer, **overlap)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        ddp(x).square().mean().backward()
        optimizer.step()
        found.append(layer_statistics(model, optimizer))
    return found


def overlapped(kind: str, mode: str) -> Found:
    model = net()
    # Small buckets: a bucket for each layer.
    return trained(kind, model, DistributedDataParallel(model, bucket_cap_mb=1e-5), mode=mode)


def sharded(kind: str) -> Found:
    model = net()
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    return trained(kind, model, model)


def assert_close(found: Found, expected: Found) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert list(mine) == list(theirs) == ["0.weight", "2.weight"]
        for name, layer in theirs.items():
            assert mine[name].trust_ratio == pytest.approx(layer.trust_ratio, rel=1e-5)
            assert mine[name].norms == pytest.approx(layer.norms, rel=1e-5)


@pytest.mark.parametrize("mode", ["step", "norms"])
@pytest.mark.parametrize("kind", KINDS)
def test_overlapped(kind: str, mode: str) -> None:
    alone = net()
    expected = trained(kind, alone, alone)
    for found in run(2, overlapped, kind, mode):
        assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded(kind: str) -> None:
    alone = net()
    expected = trained(kind, alone, alone)
    for found in run(2, sharded, kind):
        assert_close(found, expected)
