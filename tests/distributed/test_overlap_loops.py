"""Training loops of every kind, with overlap and without: the same bits at the end."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import Result, Setting, is_ahead, make, result, train
from distributed.overlap_loops import MANY, both, loop, loss_of, same, start
from distributed.processes import run


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
    count = is_ahead("LAMB", mode) * len(first.params)
    one = int(is_ahead("LAMB", mode))
    assert first.early[:6] == [0, 0, count - one, 0, count, count]
    assert [first.early[i] for i in (8, 10, 13, 16)] == [count] * 4


def switched(overlapped: bool, mode: str) -> Result:
    """One group of two gets momentum buffers: the step is left to step() as a whole."""
    net = make(Setting())
    params = list(net.parameters())
    groups = [{"params": params[:-2]}, {"params": params[-2:], "momentum": 0.0}]
    ddp, optimizer = DistributedDataParallel(net, **MANY), fastlars.LARS(groups, lr=1.0)
    if overlapped:
        fastlars.distributed.overlap(ddp, optimizer, mode=mode)
    early = loop(ddp, optimizer, 3)
    optimizer.param_groups[1]["momentum"] = 0.9
    return result(net, optimizer, early=early + loop(ddp, optimizer, 3))


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_an_option_of_one_group(mode: str) -> None:
    (first, _) = same(switched, mode)
    count = len(first.params)
    assert first.early == [0, 0, count, 0, count, count]


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
        early += loop(ddp, optimizer, 3)
        if number == 1:
            optimizer.zero_grad()
            loss_of(ddp, 9).backward()
        if overlapped:
            handle.remove()
        if number == 1:
            optimizer.step()
        assert optimizer.overlap_hook is None
        early += loop(ddp, optimizer, 2)
    return result(net, optimizer, early=early)


@pytest.mark.parametrize("size", [2, 3])
def test_remove_and_overlap_again(size: int) -> None:
    """Also between backward and step(), which then finishes what has begun."""
    first, *_ = same(removed, size=size)
    count = len(first.params)
    assert first.early == [0, 0, count, 0, 0] * 3


def trained(_: bool, __: str) -> Result:
    return train(Setting(overlap={}))


def test_every_process_has_the_same_bits() -> None:
    first, *others = run(4, trained, True, "step")
    for other in others:
        other.losses, first.losses = [], []
        other.assert_same(first)
