"""A DDP module under overlap stays a module: copied, averaged, saved; and what wraps optimizers."""

from __future__ import annotations

import copy
import io
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import fastlars
from distributed.overlap_cases import Result, Setting, count_early, make, result
from distributed.overlap_loops import MANY, loop, loss_of, same
from distributed.processes import run
from fastlars.distributed import overlap
from tolerances import assert_same_bits


def reloaded(ddp: Any) -> Any:
    file = io.BytesIO()
    torch.save(ddp, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": reloaded,
    "AveragedModel": lambda ddp: AveragedModel(ddp).module,
}


def copied(how: str, overlapped: bool, mode: str) -> Result:
    """A copy trains with an overlap of its own, next to the module that it was made of."""
    net = make(Setting())
    ddp = DistributedDataParallel(net, **MANY)
    optimizer = fastlars.LAMB(net.parameters(), lr=0.05)
    handles = [overlap(ddp, optimizer, mode=mode)] if overlapped else []
    for handle in copy.deepcopy(handles):
        handle.remove()  # which ends nothing
    early = loop(ddp, optimizer, 3)
    optimizer.zero_grad()
    loss_of(ddp, 3).backward()
    COPIES[how](ddp)  # with weights that are a step ahead
    optimizer.step()
    other = COPIES[how](ddp)
    second = fastlars.LAMB(other.parameters(), lr=0.05)
    early += loop(other, second, 2)  # a copy is not overlapped by itself
    if overlapped:
        handles.append(overlap(other, second, mode=mode))
        with pytest.raises(RuntimeError, match="DDP module is overlapped already"):
            overlap(other, fastlars.LAMB(other.parameters(), lr=0.05))
    early += loop(other, second, 3) + loop(ddp, optimizer, 1)
    for handle in handles:
        handle.remove()
    third = COPIES[how](ddp)  # of what was overlapped once
    if overlapped:
        overlap(ddp, optimizer, mode=mode)
        overlap(third, second := fastlars.LAMB(third.parameters(), lr=0.05), mode=mode)
    else:
        second = fastlars.LAMB(third.parameters(), lr=0.05)
    early += loop(ddp, optimizer, 3) + loop(third, second, 3)
    first, last = result(net, optimizer, early=early), result(third.module, second)
    first.params += last.params + [p.detach() for p in other.parameters()]
    return first


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    (first, _) = same(partial(copied, how))
    count = len(list(make(Setting()).parameters()))
    assert first.early == [0, 0, count, 0, 0, 0, 0, count, count, *[0, 0, count] * 2]


def copied_of_three(overlapped: bool, mode: str) -> Result:
    """With views of buckets and three processes, overlap has hooks on parameters."""
    net = make(Setting())
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True, **MANY)
    optimizer = fastlars.LARS(net.parameters(), lr=0.5)
    if overlapped:
        overlap(ddp, optimizer, mode=mode)
    loop(ddp, optimizer, 2)
    other = copy.deepcopy(ddp)
    reloaded(ddp)
    second = fastlars.LARS(other.parameters(), lr=0.5)
    if overlapped:
        overlap(other, second)
    loop(other, second, 3)
    return result(other.module, second)


def test_copies_of_three_processes() -> None:
    same(copied_of_three, size=3)


def copied_hooks() -> tuple[int, int]:
    """A copy is not held to what overlap refuses, and hooks do not pile up."""
    net = make(Setting())
    ddp = DistributedDataParallel(net, **MANY)
    optimizer = fastlars.LARS(net.parameters(), lr=0.5)
    overlap(ddp, optimizer)
    other = copy.deepcopy(ddp)
    with other.join(divide_by_initial_world_size=False):
        loss_of(other, 0).backward()
    handle = overlap(other, fastlars.LARS(other.parameters(), lr=0.5))
    hooks = len(other._forward_hooks)
    handle.remove()
    return hooks, len(other._forward_hooks) + len(other._forward_pre_hooks)


def test_hooks_of_copies() -> None:
    assert run(2, copied_hooks) == [(1, 0)] * 2


def _lightning(inner: Any) -> Any:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(inner)


def _fabric(inner: Any) -> Any:
    from lightning.fabric.strategies import SingleDeviceStrategy
    from lightning.fabric.wrappers import _FabricOptimizer

    return _FabricOptimizer(inner, SingleDeviceStrategy(device="cpu"))


def _accelerate(inner: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_optimizer(inner)


WRAPPERS = {"lightning": _lightning, "lightning.fabric": _fabric, "accelerate": _accelerate}


def wrapped(name: str) -> str:
    """Overlap is given the wrapper; the framework steps the optimizer inside."""
    ended = []
    for overlapped in (False, True):
        net = make(Setting())
        ddp = DistributedDataParallel(net, **MANY)
        inner = fastlars.LARS(net.parameters(), lr=0.5)
        wrapper = WRAPPERS[name](inner)
        if overlapped:
            handle = overlap(ddp, wrapper)
            with pytest.raises(RuntimeError, match="optimizer already steps during backward"):
                overlap(ddp, inner)
        for step in range(4):
            inner.zero_grad()
            loss_of(ddp, step).backward()
            if step == 3 and overlapped:
                assert count_early(inner) == len(list(net.parameters()))
            inner.step()
        if overlapped:
            handle.remove()
            assert inner.overlap_hook is None
        ended.append([p.detach().clone() for p in net.parameters()])
    for i, (mine, theirs) in enumerate(zip(*ended, strict=True)):
        assert_same_bits(f"parameter {i}", mine, theirs)
    return "ran"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                find_spec(name.split(".")[0]) is None, reason=f"{name} is not installed"
            ),
        )
        for name in WRAPPERS
    ],
)
def test_wrappers_of_frameworks(name: str) -> None:
    assert run(1, wrapped, name) == ["ran"]


def wrapped_otherwise() -> None:
    """A wrapper that steps something else is refused by its name."""
    ddp = DistributedDataParallel(nn.Linear(3, 2))

    class Wrapper:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)

    with pytest.raises(TypeError, match="an optimizer of fastlars, got SGD"):
        overlap(ddp, Wrapper())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an optimizer of fastlars, got ZeroRedundancyOptimizer"):
        overlap(
            ddp,
            ZeroRedundancyOptimizer(ddp.parameters(), fastlars.LARS, lr=0.1),
        )


def test_other_wrappers() -> None:
    run(1, wrapped_otherwise)
