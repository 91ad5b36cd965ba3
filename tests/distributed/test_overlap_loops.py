"""Training loops of every kind, with overlap and without: the same bits at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import Result, Setting, count_early, images, make, result, train
from distributed.processes import run

MANY = {"bucket_cap_mb": 0.001}
Loop = Callable[[bool, str], Result]


def both(loop: Loop, mode: str) -> list[list[Result]]:
    return [loop(overlapped, mode) for overlapped in (False, True)]


def same(loop: Loop, mode: str = "step", size: int = 2) -> list[Result]:
    """The overlapped runs' results."""
    found = run(size, both, loop, mode)
    for plain, overlapped in found:
        overlapped.assert_same(plain)
        overlapped.losses, found[0][0].losses = [], []
        overlapped.assert_same(found[0][0])
    return [overlapped for _, overlapped in found]


def start(
    net: nn.Module, overlapped: bool, mode: str, params: Any = None, **ddp: Any
) -> tuple[DistributedDataParallel, Any]:
    module = DistributedDataParallel(net, **{**MANY, **ddp})
    params = list(net.parameters()) if params is None else params
    optimizer = fastlars.LAMB(params, lr=0.05, weight_decay=1e-3)
    if overlapped:
        fastlars.distributed.overlap(module, optimizer, mode=mode)
    return module, optimizer


def loss_of(module: nn.Module, step: int) -> Tensor:
    x, y = images(step, dist.get_rank(), torch.float32)
    return nn.functional.cross_entropy(module(x), y)


def loop(module: nn.Module, optimizer: Any, steps: int = 5) -> list[int]:
    early = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(module, step).backward()
        early.append(count_early(optimizer))
        optimizer.step()
    return early


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
    assert first.early[-1] == len(first.params) - 2


def elsewhere(overlapped: bool, mode: str) -> Result:
    """The optimizer has a parameter that DDP does not have, and DDP one that it does not have."""
    net = make(Setting())
    torch.manual_seed(dist.get_rank())
    own = nn.Parameter(torch.ones(10))
    params = [*list(net.parameters())[1:], own]
    ddp, optimizer = start(net, overlapped, mode, params)
    for step in range(5):
        optimizer.zero_grad()
        (loss_of(ddp, step) + own.square().sum()).backward()
        optimizer.step()
    found = result(net, optimizer)
    found.params.append(own.detach())
    return found


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_parameters_elsewhere(mode: str) -> None:
    (first, _) = same(elsewhere, mode)
    assert not torch.equal(first.params[-1], torch.ones(10))


def closures(overlapped: bool, mode: str) -> Result:
    net = make(Setting())
    ddp, optimizer = start(net, overlapped, mode)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    losses = []
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(ddp, step)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure)))
    assert calls == ["before", "after"] * 4
    return result(net, optimizer, losses)


def test_closures_and_step_hooks() -> None:
    same(closures)


def changes(overlapped: bool, mode: str) -> Result:
    """What training loops do to an optimizer between steps."""
    net = make(Setting())
    params = list(net.parameters())
    ddp, optimizer = start(net, overlapped, mode, params[:-1])
    early = loop(ddp, optimizer, 3)
    optimizer.add_param_group({"params": params[-1:], "lr": 0.01})
    early += loop(ddp, optimizer, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    early += loop(ddp, optimizer, 3)
    optimizer.param_groups[0]["betas"] = (0.8, 0.9)
    optimizer.param_groups[0]["lr"] = 0.02
    early += loop(ddp, optimizer, 2)
    optimizer.state.clear()
    early += loop(ddp, optimizer, 3)
    params[0].data = params[0].data.clone()
    params[1].data = torch.ones_like(params[1].data)
    early += loop(ddp, optimizer, 3)
    return result(net, optimizer, early=early)


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_changes_between_steps(mode: str) -> None:
    (first, _) = same(changes, mode)
    count = len(first.params)
    assert first.early[:6] == [0, count - 1, count - 1, 0, count, count]
    assert [first.early[i] for i in (8, 10, 13, 16)] == [count] * 4


def evaluation(overlapped: bool, mode: str) -> Result:
    """Forward passes without a backward, backward passes without a step, forgotten gradients."""
    net = make(Setting())
    ddp, optimizer = start(net, overlapped, mode)
    losses = []
    for step in range(4):
        loop(ddp, optimizer, 1)
        with torch.no_grad():
            losses.append(float(loss_of(ddp, step)))
        losses.append(float(loss_of(net.eval(), step).detach()))
        with ddp.no_sync():
            loss_of(ddp.train(), step).backward()  # gradients of this process alone
        optimizer.zero_grad()
        optimizer.step()  # nothing to do
    return result(net, optimizer, losses)


def test_evaluation_in_between() -> None:
    same(evaluation)


def uneven(overlapped: bool, mode: str) -> Result:
    net = make(Setting())
    ddp, optimizer = start(net, overlapped, mode)
    early = []
    with ddp.join():
        for _ in range(3 + 2 * dist.get_rank()):
            early += loop(ddp, optimizer, 1)
    found = result(net, optimizer, early=early)
    found.states = [] if dist.get_rank() == 0 else found.states
    found.ratios = []  # those of each process's own last step
    return found


def test_uneven_inputs_with_join() -> None:
    """A process that has joined reduces the others' buckets, and steps none of them."""
    found = run(2, both, uneven, "step")
    for plain, overlapped in found:
        overlapped.assert_same(plain)
    assert [len(overlapped.early) for _, overlapped in found] == [3, 5]
    assert found[1][1].early[-1] == len(found[1][1].params)


def removed(overlapped: bool, mode: str) -> Result:
    net = make(Setting())
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True, **MANY)
    optimizer = fastlars.LARS(net.parameters(), lr=1.0)
    early = []
    for number in range(3):
        if overlapped:
            handle = fastlars.distributed.overlap(ddp, optimizer, mode=mode)
        early += loop(ddp, optimizer, 2)
        if number == 1:
            optimizer.zero_grad()
            loss_of(ddp, 9).backward()
        if overlapped:
            handle.remove()
        if number == 1:
            optimizer.step()
        assert optimizer._ahead is None
        early += loop(ddp, optimizer, 2)
    return result(net, optimizer, early=early)


@pytest.mark.parametrize("size", [2, 3])
def test_remove_and_overlap_again(size: int) -> None:
    """Also between backward and step(), which then finishes what has begun."""
    first, *_ = same(removed, size=size)
    count = len(first.params)
    assert first.early == [0, count, 0, 0] * 3


def trained(_: bool, __: str) -> Result:
    return train(Setting(overlap={}))


def test_every_process_has_the_same_bits() -> None:
    first, *others = run(4, trained, True, "step")
    for other in others:
        other.losses, first.losses = [], []
        other.assert_same(first)
