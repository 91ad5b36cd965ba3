"""The overlap on a GPU: NCCL, and a stream beside that of backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import CLASSES, count_early, is_ahead
from distributed.processes import run
from optimizers import assert_same


def wide() -> nn.Sequential:
    """Wide layers, so that steps take time while the next ones are reduced."""
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)), nn.Linear(1024, 10)).cuda()


def trained(kind: str, overlap: dict[str, Any] | None, clip: float | None) -> Any:
    net = wide()
    group = dist.new_group(backend="nccl")
    ddp = DistributedDataParallel(net, [0], process_group=group, bucket_cap_mb=4)
    optimizer = CLASSES[kind](net.parameters(), lr=0.01, max_grad_norm=clip)
    if overlap is not None:
        fastlars.distributed.overlap(ddp, optimizer, **overlap)
    early = steps(ddp, optimizer)
    found = [p.detach().cpu() for p in net.parameters()]
    dist.destroy_process_group(group)
    return found, early


def steps(module: nn.Module, optimizer: Any) -> int:
    """Ten steps; how many parameters were early."""
    early = 0
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 1024, generator=generator).cuda()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), torch.arange(64, device="cuda") % 10).backward()
        early += count_early(optimizer)
        optimizer.step()
    return early


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


def sharded() -> list[tuple[list[Tensor], int]]:
    """By FSDP2, over one process: the norm of a clip is what it measures early."""
    found = []
    for overlapped in (False, True):
        net = wide()
        mesh = init_device_mesh("cuda", (1,))
        for part in (*net, net):
            fully_shard(part, mesh=mesh)
        optimizer = fastlars.LAMB(net.parameters(), lr=0.01, max_grad_norm=0.1)
        if overlapped:
            fastlars.distributed.overlap(net, optimizer)
        early = steps(net, optimizer)
        found.append(([p.to_local().detach().cpu() for p in net.parameters()], early))  # type: ignore[attr-defined]
    return found


@pytest.mark.gpu
def test_fsdp_has_the_bits_of_no_overlap() -> None:
    (((plain, none), (overlapped, early)),) = run(1, sharded)
    assert (none, early) == (0, 8 * 18)
    assert_same("weight", overlapped, plain)
