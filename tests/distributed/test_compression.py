"""Gradients that travel in half precision: how they are rounded, and that nothing overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import Setting, images, make, train_all
from distributed.processes import run
from fastlars.distributed.averaging import compress
from optimizers import assert_same

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MANY = {"bucket_cap_mb": 0.001}
RATE = 2.0**-10  # a power of two rounds nothing


@pytest.mark.parametrize("dtype", HALVES.values())
def test_divides_then_rounds(dtype: torch.dtype) -> None:
    g = torch.randn(10_000) * 10.0 ** torch.randint(-6, 5, (10_000,))
    found = compress(g, 3, torch.empty_like(g, dtype=dtype))
    assert_same("gradient", [found], [(g * (1.0 / 3.0)).to(dtype)])
    in_half = g.to(dtype) * (1.0 / 3.0)
    assert not torch.equal(found, in_half)  # the other order is another number


def test_no_overflow_at_1024_processes() -> None:
    """The largest float16 from each of 1,024: their sum would be 1,024 times too large."""
    ranks = 1024
    largest = torch.finfo(torch.float16).max
    g = torch.tensor([largest, -largest, 60_000.0, 1.0])
    assert bool((g.half() * ranks).isinf()[:3].all())
    pieces = [compress(g, ranks, torch.empty(4, dtype=torch.float16)) for _ in range(ranks)]
    ring = pieces[0].clone()
    for piece in pieces[1:]:
        ring += piece
        assert ring.isfinite().all()
    while len(pieces) > 1:  # halving and doubling
        pieces = [a + b for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
        assert all(bool(piece.isfinite().all()) for piece in pieces)
    for total in (ring, pieces[0]):
        # Adding one by one loses at most half a unit of the sum at each of 1,024 additions.
        torch.testing.assert_close(total.float(), g, rtol=0.5, atol=0)
    assert_same("tree", [pieces[0].float()], [g.half().float()])


def gradients_used(name: str, mode: str, clip: float | None) -> Any:
    """What a step along the average does to the weights, the average, and the gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    for p in net.parameters():
        nn.init.normal_(p)
    ddp = DistributedDataParallel(net, **MANY)
    optimizer = fastlars.LARS(
        net.parameters(), lr=RATE, momentum=0.0, adapt=False, max_grad_norm=clip
    )
    fastlars.distributed.overlap(ddp, optimizer, compression=name, mode=mode)
    moves, expected, held, own = [], [], [], []
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        x = torch.randn(4, 6)
        with torch.enable_grad():
            loss = net(x).square().sum()
        mine = torch.autograd.grad(loss, list(net.parameters()))
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.zero_grad()
        ddp(x).square().sum().backward()
        held.append([p.grad.clone() for p in net.parameters()])
        optimizer.step()
        expected.append([_sum(g, HALVES[name]) for g in mine])
        own.append(list(mine))
        moves.append(
            [(b, p.detach().clone()) for b, p in zip(before, net.parameters(), strict=True)]
        )
    return moves, expected, held, own


def _sum(g: Tensor, dtype: torch.dtype) -> Tensor:
    """The stated rounding, and one more for the sum of two."""
    halves: list[Any] = [None] * 2
    dist.all_gather_object(halves, (g * 0.5).to(dtype))
    return (halves[0].float() + halves[1].float()).to(dtype).float()


@pytest.mark.parametrize("mode", ["step", "norms"])
@pytest.mark.parametrize("name", HALVES)
def test_the_step_reads_the_rounded_sum(name: str, mode: str) -> None:
    for moves, expected, held, own in run(2, gradients_used, name, mode, None):
        for step in range(3):
            for i, (before, after) in enumerate(moves[step]):
                assert_same(f"weight {i}", [after], [before - RATE * expected[step][i]])
        # DDP's first step is not overlapped; buckets that are stepped after it leave p.grad to be
        # this process's own.
        assert_same("first gradients", held[0], expected[0])
        assert_same("gradients", held[2], own[2] if mode == "step" else expected[2])


@pytest.mark.parametrize("name", HALVES)
def test_with_a_global_clip_gradients_are_what_was_used(name: str) -> None:
    for moves, expected, held, _ in run(2, gradients_used, name, "step", 1e9):
        for step in range(3):
            assert_same("gradients", held[step], expected[step])
            for i, (before, after) in enumerate(moves[step]):
                assert_same(f"weight {i}", [after], [before - RATE * expected[step][i]])


@pytest.mark.parametrize("kind", ["LARS", "LAMB"])
@pytest.mark.parametrize("name", HALVES)
def test_modes_and_buckets_agree_to_the_bit(name: str, kind: str) -> None:
    settings = [
        Setting(kind, ddp={"bucket_cap_mb": cap}, overlap={"compression": name, "mode": mode})
        for cap, mode in ((25, "step"), (0.001, "step"), (0.001, "norms"))
    ]
    settings.append(Setting(kind, ddp=MANY, overlap={}))
    for first, second, third, uncompressed in run(2, train_all, *settings):
        second.assert_same(first)
        third.assert_same(first)
        assert not torch.equal(first.params[0], uncompressed.params[0])
        for mine, theirs in zip(first.params, uncompressed.params, strict=True):
            assert float((mine - theirs).norm()) < 0.1 * float(theirs.norm())


def unstepped() -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of parameters that another optimizer steps."""
    net = make(Setting())
    params = list(net.parameters())
    ddp = DistributedDataParallel(net)  # one bucket
    optimizer = fastlars.LARS(params[1:], lr=0.1)
    fastlars.distributed.overlap(ddp, optimizer, compression="fp16")
    found, others = [], []
    for step in range(3):
        optimizer.zero_grad()
        x, y = images(step, dist.get_rank(), torch.float32)
        nn.functional.cross_entropy(ddp(x), y).backward()
        assert params[0].grad is not None
        found.append(params[0].grad.clone())
        optimizer.step()
        params[0].grad = None
        both: list[Any] = [None] * 2
        dist.all_gather_object(both, found[-1])
        others.append(both[1 - dist.get_rank()])
    return found, others


def test_gradients_that_another_optimizer_needs_are_averages() -> None:
    for mine, theirs in run(2, unstepped):
        assert_same("gradient", mine, theirs)


def halved(name: str) -> list[torch.dtype]:
    net = make(Setting(dtype=torch.bfloat16))
    ddp = DistributedDataParallel(net)
    optimizer = fastlars.LARS(net.parameters(), lr=0.1)
    fastlars.distributed.overlap(ddp, optimizer, compression=name)
    dtypes = []
    for step in range(3):
        optimizer.zero_grad()
        x, y = images(step, dist.get_rank(), torch.bfloat16)
        nn.functional.cross_entropy(ddp(x), y).backward()
        dtypes += [b.batch.dtypes.grad for s in optimizer.overlap_hook.in_flight for b in s.batches]
        optimizer.step()
    return dtypes


def test_buckets_of_16_bits_stay_as_they_are() -> None:
    """bfloat16 gradients may not fit a float16."""
    assert run(2, halved, "fp16")[0] == [torch.bfloat16]
