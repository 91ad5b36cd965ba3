"""Overlap has the bits of no overlap, whatever the buckets, options and number of processes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from inspect import signature
from operator import is_
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import (
    Result,
    Setting,
    buckets,
    images,
    is_ahead,
    make,
    make_optimizer,
    resnet,
    train_all,
    train_joined,
)
from distributed.processes import run
from fastlars.in_backward.pieces import InFlightPiece, PremeasuredBatch, with_known_sums
from fastlars.optim.planner import slices_of
from fastlars.optim.scalars import scalars_for
from optimizers import SIMPLE

ONE, THREE, MANY = 25, 0.25, 0.001  # bucket_cap_mb for the narrow ResNet-18
needs_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="ResNet-18 is torchvision's, which is not installed"
)
BF16 = torch.bfloat16


def both(setting: Setting, size: int = 2, **keywords: Any) -> list[Result]:
    """With overlap, in every process; all that overlap must not change was compared."""
    overlapped = replace(setting, overlap=keywords)
    found = run(size, train_all, setting, overlapped)
    for plain, result in found:
        result.assert_same(plain)
        found[0][0].assert_same(replace(plain, losses=found[0][0].losses))
    return [result for _, result in found]


@cache
def twenty_steps(kind: str) -> list[Result]:
    setting = Setting(kind, net=resnet, steps=20)
    return [results[0] for results in run(2, train_all, setting)]


@needs_torchvision
@pytest.mark.parametrize("cap", [ONE, THREE, MANY])
@pytest.mark.parametrize("kind", ["LARS", "LAMB"])
def test_twenty_steps_of_resnet_18(kind: str, cap: float) -> None:
    setting = Setting(kind, resnet, {}, ddp={"bucket_cap_mb": cap}, steps=20)
    for (result,), plain in zip(run(2, train_all, setting), twenty_steps(kind), strict=True):
        # A sum of two has no order: these bits do not depend on the buckets.
        result.assert_same(plain)
        assert result.early[:2] == [0, 0]
        assert set(result.early[2:]) == {len(result.params)}


@needs_torchvision
@pytest.mark.parametrize(("cap", "least", "most"), [(ONE, 1, 1), (THREE, 3, 3), (MANY, 20, 100)])
def test_there_are_as_many_buckets_as_the_tests_think(cap: float, least: int, most: int) -> None:
    (count, _) = run(2, buckets, Setting(net=resnet, ddp={"bucket_cap_mb": cap}))
    assert least <= count <= most


@pytest.mark.parametrize("kind", ["LARS", "LAMB"])
def test_one_process_with_the_joined_batch(kind: str) -> None:
    """To rounding: convolutions add up another batch in another order."""
    setting = Setting(kind, overlap={}, ddp={"bucket_cap_mb": MANY}, steps=4)
    joined = train_joined(setting, 2)
    for (result,) in run(2, train_all, setting):
        for mine, theirs in zip(result.params, joined.params, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


VIEW = {"gradient_as_bucket_view": True, "bucket_cap_mb": MANY}


@pytest.mark.parametrize(
    "setting",
    [
        Setting(ddp={"bucket_cap_mb": MANY}),
        Setting(ddp=VIEW),
        Setting(ddp=VIEW, keep=True),
        Setting(ddp=VIEW, backwards=3),
        pytest.param(
            Setting(ddp={"batched_grad_copy": True, "bucket_cap_mb": MANY}),
            marks=pytest.mark.skipif(
                "batched_grad_copy" not in signature(DistributedDataParallel).parameters,
                reason=f"torch {torch.__version__} has no DDP(batched_grad_copy=)",
            ),
        ),
    ],
    ids=["copies", "views", "kept views", "accumulated views", "batched copies"],
)
def test_three_processes(setting: Setting) -> None:
    """A third is no float: DDP multiplies by it here, and divides by three there."""
    results = both(setting, 3)
    assert results[0].early[-1] == len(results[0].params)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(optimizer={"momentum_correction": True, "maximize": True}),
        Setting(optimizer={"momentum": 0.0, "ratio": "combined"}),
        Setting("LAMB", optimizer={"bias_correction": "rate", "state_dtype": BF16}),
        *(Setting(row.kind.__name__, optimizer=row.needed) for row in SIMPLE),
        Setting(dtype=BF16, optimizer={"master_weights": True}),
        Setting(dtype=torch.float64),
        Setting(optimizer={"lr": torch.tensor(1.5)}),
    ],
    ids=[
        "correction",
        "combined",
        "LAMB bfloat16 states",
        *map(repr, SIMPLE),
        "masters",
        "float64",
        "lr tensor",
    ],
)
@pytest.mark.parametrize("mode", ["step", "norms"])
def test_options(setting: Setting, mode: str) -> None:
    results = both(replace(setting, ddp=VIEW), mode=mode)
    assert results[0].early[-1] == is_ahead(setting.kind, mode) * len(results[0].params)


@pytest.mark.parametrize("kind", ["LARS", "LAMB"])
@pytest.mark.parametrize("mode", ["step", "norms"])
def test_stochastic_rounding(kind: str, mode: str) -> None:
    """Rounded with the random bits of a step that is not cut into buckets."""
    options = {"stochastic_rounding": True}
    setting = Setting(kind, dtype=BF16, optimizer=options, ddp={"bucket_cap_mb": MANY})
    results = both(setting, mode=mode)
    assert results[0].early[-1] == (mode == "step") * len(results[0].params)


@pytest.mark.parametrize("ddp", [VIEW, {"bucket_cap_mb": MANY}], ids=["views", "copies"])
@pytest.mark.parametrize("mode", ["step", "norms"])
@pytest.mark.parametrize("kind", ["LARS", "LAMB", "LANS"])
def test_a_global_clip(kind: str, mode: str, ddp: dict[str, Any]) -> None:
    """Only norms are taken early, and the norm is that of all gradients."""
    setting = Setting(kind, ddp=ddp, optimizer={"max_grad_norm": 0.5})
    results = both(setting, mode=mode)
    assert results[0].early[-1] == len(results[0].params)


def test_norms_of_interleaved_buckets_come_back_in_order() -> None:
    """Their sum, and so its last bit, depends on the order."""
    params = [nn.Parameter(torch.ones(2 + i)) for i in range(6)]
    optimizer = fastlars.LARS(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    buckets, groups = [], optimizer.param_groups
    for mine in (params[1::2], params[::2]):
        own = {p: p.grad for p in mine if p.grad is not None}
        (part,) = slices_of(groups, own)
        batches = optimizer.planner.bind_slice(part, groups, optimizer.state)
        scalars = scalars_for(b.backend for b in batches)
        each = [scalars.unclipped(b.sign, b.device) for b in batches]
        buckets.append(InFlightPiece(batches, each, "clip"))
        buckets[-1].work_early()
    (batch,) = with_known_sums(optimizer.bind_groups(), buckets)
    assert isinstance(batch, PremeasuredBatch)
    assert batch.of_gradients is not None
    assert batch.of_gradients[:, -1].tolist() == [2.0 + i for i in range(6)]


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("mode", ["step", "norms"])
def test_accumulation_under_no_sync(mode: str, view: bool) -> None:
    ddp = {"gradient_as_bucket_view": view, "bucket_cap_mb": MANY}
    both(Setting("LAMB", ddp=ddp, backwards=3), mode=mode)


def stepped_before(mode: str) -> tuple[bool, bool]:
    """Whether the last layer has moved when the first one's gradient comes; and after step()."""
    setting = Setting(ddp=VIEW)
    net = make(setting)
    ddp = DistributedDataParallel(net, **setting.ddp)
    optimizer = make_optimizer(setting, net)
    fastlars.distributed.overlap(ddp, optimizer, mode=mode)
    first, *_, last, _ = net.parameters()
    moved = []

    def look(_: Any) -> None:
        if optimizer.overlap_hook.in_flight:
            # Not a race: the callback is queued, and needs no more of this thread.
            optimizer.overlap_hook.in_flight[0].future.wait()
            moved.append(not torch.equal(last, before))

    first.register_hook(look)
    for step in range(4):
        before = last.detach().clone()
        optimizer.zero_grad()
        x, y = images(step, 0, torch.float32)
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    return all(moved) and len(moved) == 2, not torch.equal(last, before)


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_it_overlaps(mode: str) -> None:
    for during, after in run(2, stepped_before, mode):
        assert during is (mode == "step")
        assert after


def waited_for(kind: str, mode: str, clip: float | None) -> list[tuple[bool, int]]:
    """Whether the future of each bucket holds what its works gave, and how much that was."""
    setting = Setting(kind, ddp=VIEW, optimizer={"max_grad_norm": clip})
    net = make(setting)
    ddp = DistributedDataParallel(net, **setting.ddp)
    optimizer = make_optimizer(setting, net)
    fastlars.distributed.overlap(ddp, optimizer, mode=mode)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        x, y = images(step, 0, torch.float32)
        nn.functional.cross_entropy(ddp(x), y).backward()
        for started in optimizer.overlap_hook.in_flight:
            made = [result for result in started.results if result is not None]
            value = started.future.value()
            same = len(value) == len(made) and all(map(is_, value, made))
            found.append((same, len(made)))
        optimizer.step()
    return found


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mode", ["step", "norms"])
@pytest.mark.parametrize("kind", ["LARS", "LAMB"])
def test_who_waits_for_a_bucket_waits_for_its_kernels(
    kind: str, mode: str, clip: float | None
) -> None:
    """On CUDA a future waits for the streams of the tensors in its value, and for no others."""
    (found,) = run(1, waited_for, kind, mode, clip)
    assert all(same for same, _ in found)
    assert (sum(count for _, count in found) > 0) is is_ahead(kind, mode, clip is not None)
