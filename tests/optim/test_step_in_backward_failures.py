"""fastlars.step_in_backward: backward passes and back ends that fail, and how training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlars
from fastlars.backends.cpu import Cpu
from optim.in_backward_cases import (
    Net,
    early_of,
    early_pair,
    inputs,
    row_of,
    train,
)
from optimizers import one_thread

__all__ = ["one_thread"]


class Fails(torch.autograd.Function):
    """The identity, whose backward pass fails when it is told to."""

    fail = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if Fails.fail:
            raise ZeroDivisionError("as asked")
        return gradient


class Failing(Net):
    """Fails before or after the gradients of its last layers arrive."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        for i, p in enumerate(self.layers):
            x = (p * x).tanh().sum() + x
            x = Fails.apply(x) if i == (4 if self.first else 0) else x
        return x


@pytest.fixture
def failing() -> Iterator[None]:
    Fails.fail = True
    yield
    Fails.fail = False


class FailingAtTheEnd(Net):
    """All gradients arrive in backward passes within the one that fails."""

    def forward(self, x: Tensor) -> Tensor:
        x = Fails.apply(x.clone().requires_grad_())
        for p in self.layers:
            x = checkpoint(lambda x, p=p: (p * x).tanh().sum() + x, x, use_reentrant=True)
        return x


def test_an_error_after_some_were_stepped(failing: None) -> None:
    net, optimizer, handle = early_pair(Failing(first=False))
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    assert early_of(net) >= 2
    with pytest.raises(RuntimeError, match=r"error after \d of 5 parameters were stepped: go on"):
        optimizer.step()
    # From a checkpoint: here, the beginning.
    Fails.fail = False
    fresh = Failing(first=False)
    net.load_state_dict(fresh.state_dict())
    optimizer.load_state_dict(row_of["LARS"].make(fresh.parameters()).state_dict())
    again = train(net, optimizer, handle)
    again.assert_same(train(fresh, row_of["LARS"].make(fresh.parameters())))
    assert min(again.early) >= 3


def test_an_error_after_nested_backward_passes(failing: None) -> None:
    net, optimizer, _ = early_pair(FailingAtTheEnd())
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    with pytest.raises(RuntimeError, match=r"error after \d of 5 parameters were stepped: go on"):
        optimizer.step()


def test_an_error_and_no_step(failing: None) -> None:
    """The error was caught, and the loop goes on with the next batch."""
    net, optimizer, _ = early_pair(Failing(first=False))
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    Fails.fail = False
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"after its parameter was stepped\. The backward pass"):
        net(inputs(1)).backward()


def test_an_error_before_anything_was_stepped(failing: None) -> None:
    """As out of memory: a smaller batch is tried, and nothing was lost."""
    net, optimizer, handle = early_pair(Failing(first=True))
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    Fails.fail = False
    fresh = Failing(first=True)
    train(net, optimizer, handle).assert_same(train(fresh, row_of["LARS"].make(fresh.parameters())))


class RunsOut(torch.nn.Module):
    """Two types of parameters, so that a piece of them is stepped in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.full((20,), 0.5))
        self.narrow = nn.Parameter(torch.full((20,), 0.5, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return (self.wide * x).sum() + (self.narrow * x).sum()


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_back_end_that_fails_within_a_piece(
    goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that runs out of memory: its first batch is written, and not stepped again."""
    monkeypatch.setenv("FASTLARS_CHECK", "0")  # it calls the back end too
    net = RunsOut()
    optimizer = row_of["LARS"].make(net.parameters())
    fastlars.step_in_backward(net, optimizer, bucket_mb=100 / 2**20)
    right, calls = Cpu.step, []

    def failing_step(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("as asked")
        return right(*arguments)

    monkeypatch.setattr(Cpu, "step", failing_step)
    with pytest.raises(MemoryError):
        net(inputs(0)).backward()
    if goes_on:
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"after its parameter was stepped\. The backward"):
            net(inputs(1)).backward()
    with pytest.raises(RuntimeError, match="backward ended in an error after 2 of 2"):
        optimizer.step()


def test_a_state_dict_of_half_a_step() -> None:
    net, optimizer, _ = early_pair()
    before = optimizer.state_dict()
    net(inputs(0)).backward()
    with pytest.raises(RuntimeError, match="would hold half a step"):
        optimizer.state_dict()
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 5 > len(before["state"])


def test_a_checkpoint_after_a_failed_backward_pass(failing: None) -> None:
    """In the same process, without a step() that says what went wrong."""
    net, optimizer, handle = early_pair(Failing(first=False))
    fresh = copy.deepcopy(net)
    states = optimizer.state_dict()
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    net.load_state_dict(fresh.state_dict())
    optimizer.load_state_dict(states)
    Fails.fail = False
    again = train(net, optimizer, handle)
    again.assert_same(train(fresh, row_of["LARS"].make(fresh.parameters())))


def test_an_error_and_parts_of_the_model(failing: None) -> None:
    """The module that failed is not called again: only another part of it."""
    net, optimizer, _ = early_pair(Failing(first=True))
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    optimizer.zero_grad()
    for p in net.layers:
        (p.sum() * 0.1).backward()
    optimizer.step()
