"""Modules that use their parameters in unusual ways: overlap has the bits of no overlap."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed.overlap_cases import Result, Setting, is_ahead, make, result
from distributed.overlap_loops import loop, same, start
from torch_bugs import flatten_fails_after_compiled_group_norm


def frozen(overlapped: bool, mode: str) -> Result:
    net = make(Setting())
    net[2].weight.requires_grad_(False)
    ddp, optimizer = start(net, overlapped, mode)
    return result(net, optimizer, early=loop(ddp, optimizer))


def test_frozen_parameters() -> None:
    (first, _) = same(frozen)
    assert first.early[-1] == len(first.params) - 1


class Tied(nn.Module):
    """One matrix, used first and last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 768) / 30)
        self.inner = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(nn.functional.linear(x.flatten(1), self.weight)).tanh()
        return nn.functional.linear(hidden @ self.weight, self.weight)


def tied(overlapped: bool, mode: str) -> Result:
    torch.manual_seed(3)
    net = Tied()
    ddp, optimizer = start(net, overlapped, mode)
    return result(net, optimizer, early=loop(ddp, optimizer))


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_tied_weights(mode: str) -> None:
    (first, _) = same(tied, mode)
    assert first.early[-1] == is_ahead("LAMB", mode) * len(first.params)


class Checkpointed(nn.Module):
    """Computes its middle again in backward; reentrant, that is a backward pass of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net = make(Setting())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        first, *middle, last = self.net
        x = checkpoint(nn.Sequential(*middle), first(x), use_reentrant=self.reentrant)
        return last(x)


def checkpointed(reentrant: bool, overlapped: bool, mode: str) -> Result:
    net = Checkpointed(reentrant)
    ddp, optimizer = start(net, overlapped, mode)
    return result(net, optimizer, early=loop(ddp, optimizer))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant: bool) -> None:
    (first, _) = same(partial(checkpointed, reentrant))
    assert first.early[-1] == len(first.params)


def compiled(what: str, layout: torch.memory_format, overlapped: bool, mode: str) -> Result:
    net = make(Setting()).to(memory_format=layout)
    inner = torch.compile(net, backend="aot_eager") if what == "module" else net
    ddp, optimizer = start(inner, overlapped, mode, list(net.parameters()), bucket_cap_mb=25)
    module = torch.compile(ddp, backend="aot_eager") if what == "DDP" else ddp
    if what == "step":
        step, plain = torch.compile(optimizer.step, backend="aot_eager"), optimizer.step
        optimizer.step = step if overlapped else plain
    return result(net, optimizer, early=loop(module, optimizer, 3))


@pytest.mark.parametrize("what", ["module", "DDP", "step"])
def test_compiled(what: str) -> None:
    broken = what != "step" and flatten_fails_after_compiled_group_norm()
    layout = torch.contiguous_format if broken else torch.channels_last
    (first, _) = same(partial(compiled, what, layout))
    assert first.early[-1] == len(first.params)


class Idle(nn.Module):
    """Has a layer that no output depends on, in the middle of a bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make(Setting())
        self.idle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def unused(overlapped: bool, mode: str) -> Result:
    net = Idle()
    # static_graph: DDP averages zeros for the idle layer, which without overlap is left alone.
    ddp, optimizer = start(net, overlapped, mode, static_graph=True, bucket_cap_mb=25)
    return result(net, optimizer, early=loop(ddp, optimizer))


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_unused_parameters_of_a_static_graph(mode: str) -> None:
    (first, _) = same(unused, mode)
    assert first.early[-1] == is_ahead("LAMB", mode) * (len(first.params) - 2)
