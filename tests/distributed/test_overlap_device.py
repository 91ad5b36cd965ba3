"""The overlap on a GPU: NCCL, and a stream beside that of backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import CLASSES, count_early, is_ahead
from distributed.processes import run
from optimizers import assert_same


def trained(kind: str, overlap: dict[str, Any] | None, clip: float | None) -> Any:
    """Wide layers, so that steps take time while the next ones are reduced."""
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)), nn.Linear(1024, 10)).cuda()
    group = dist.new_group(backend="nccl")
    ddp = DistributedDataParallel(net, [0], process_group=group, bucket_cap_mb=4)
    optimizer = CLASSES[kind](net.parameters(), lr=0.01, max_grad_norm=clip)
    if overlap is not None:
        fastlars.distributed.overlap(ddp, optimizer, **overlap)
    early = 0
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 1024, generator=generator).cuda()
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), torch.arange(64, device="cuda") % 10).backward()
        early += count_early(optimizer)
        optimizer.step()
    found = [p.detach().cpu() for p in net.parameters()]
    dist.destroy_process_group(group)
    return found, early


def all_three(
    kind: str, overlap: dict[str, Any], clip: float | None
) -> list[tuple[list[Tensor], int]]:
    return [trained(kind, each, clip) for each in (None, overlap, overlap)]


@pytest.mark.gpu
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("mode", ["step", "norms"])
@pytest.mark.parametrize("kind", ["LARS", "LAMB"])
def test_the_bits_of_no_overlap(kind: str, mode: str, clip: float | None) -> None:
    (((plain, none), (first, early), (second, _)),) = run(1, all_three, kind, {"mode": mode}, clip)
    assert (none, early) == (0, 8 * 18 * is_ahead(kind, mode, clip is not None))
    assert_same("weight", first, plain)
    assert_same("weight again", second, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_compression_repeats_its_bits(name: str) -> None:
    ((_, (first, _), (second, _)),) = run(1, all_three, "LAMB", {"compression": name}, None)
    assert_same("weight", second, first)
