"""fastlars.step_in_backward in training loops: copies, closures, wrappers, several optimizers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlars
from optim.in_backward_cases import (
    TINY,
    Net,
    change_weights,
    early_of,
    early_pair,
    inputs,
    result,
    row_of,
    train,
)
from optimizers import assert_same, one_thread

__all__ = ["one_thread"]


def test_changes_between_steps() -> None:
    """After step(), everything may change."""
    runs = []
    for early in (False, True):
        net = Net()
        optimizer = row_of["LAMB"].make(net.parameters())
        handle = fastlars.step_in_backward(net, optimizer, bucket_mb=TINY) if early else None

        def before(step: int, net: Net = net, optimizer: Any = optimizer) -> None:
            if step == 2:
                optimizer.param_groups[0]["weight_decay"] = 0.5
            if step == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if step == 6:
                change_weights(net, None)
            if step == 8:
                params = optimizer.param_groups[0]["params"]
                params.append(params.pop(1))

        runs.append(train(net, optimizer, handle, before=before))
    runs[1].assert_same(runs[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_take_ordinary_steps(copied: Callable[[Net], Net]) -> None:
    net, optimizer, handle = early_pair()
    train(net, optimizer, handle, steps=2)
    other = copied(net)
    second = row_of["LARS"].make(other.parameters())
    train(other, second, steps=2)
    assert early_of(other) == 0
    fastlars.step_in_backward(other, second, bucket_mb=TINY)
    assert len(other._forward_hooks) == 1
    assert pickle.loads(pickle.dumps(handle)).remove() is None


def test_remove() -> None:
    """At once, and between a backward pass and its step, which then still ends well."""
    for middle in (False, True):
        net, optimizer, handle = early_pair()
        fresh = Net()
        expected = train(fresh, row_of["LARS"].make(fresh.parameters()), steps=2)
        if middle:
            net(inputs(0)).backward()
        handle.remove()
        handle.remove()
        assert (optimizer.overlap_hook is not None) == middle
        if middle:
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.overlap_hook is None
        else:
            train(net, optimizer, steps=2).assert_same(expected)
        net(inputs(0)).backward()
        assert early_of(net) == 0
        assert not net._forward_hooks


def test_a_removed_model_is_freed() -> None:
    net, optimizer, handle = early_pair()
    train(net, optimizer, handle, steps=2)
    handle.remove()
    gone = weakref.ref(net)
    del net, optimizer, handle
    gc.collect()
    assert gone() is None


def test_other_parameters() -> None:
    """Those of the optimizer alone, and those of the model alone."""
    runs = []
    for early in (False, True):
        net, other = Net(), nn.Parameter(torch.ones(3))
        optimizer = row_of["LARS"].make([*list(net.layers)[1:], other])
        if early:
            fastlars.step_in_backward(net, optimizer, bucket_mb=TINY)
        for step in range(4):
            optimizer.zero_grad()
            (net(inputs(step)) + (other**2).sum()).backward()
            assert net.layers[0].grad is not None
            optimizer.step()
        runs.append([*result(net, optimizer).params, other.detach()])
    assert_same("weight", runs[1], runs[0])


def test_a_closure_and_hooks() -> None:
    net, optimizer, _ = early_pair()
    fresh = Net()
    plain = row_of["LARS"].make(fresh.parameters())
    counted = []
    optimizer.register_step_post_hook(lambda *_: counted.append(early_of(net)))
    for step in range(3):
        for model, chosen in ((net, optimizer), (fresh, plain)):

            def closure(model: Any = model, chosen: Any = chosen, step: int = step) -> Tensor:
                chosen.zero_grad()
                loss = model(inputs(step))
                loss.backward()
                return loss

            chosen.step(closure)
    assert counted == [0, 0, 0]
    result(net, optimizer).assert_same(result(fresh, plain))


def test_two_optimizers_of_one_model() -> None:
    runs = []
    for early in (False, True):
        net = Net()
        halves = [list(net.layers)[:3], list(net.layers)[3:]]
        optimizers = [row_of["LARS"].make(halves[0]), row_of["LAMB"].make(halves[1])]
        for optimizer in optimizers if early else ():
            fastlars.step_in_backward(net, optimizer, bucket_mb=1e-9)
        for step in range(4):
            net(inputs(step)).backward()
            assert early_of(net) == (5 if early else 0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        runs.append([p.detach() for p in net.parameters()])
    assert_same("weight", runs[1], runs[0])


def test_parts_of_a_step_by_several_losses() -> None:
    """Two backward passes of one step through different layers."""
    runs = []
    for early in (False, True):
        net = Net()
        optimizer = row_of["LAMB"].make(net.parameters())
        if early:
            fastlars.step_in_backward(net, optimizer, bucket_mb=1e-9)
        for step in range(4):
            optimizer.zero_grad()
            for net.dropped in ((0, 1), (2, 3, 4)):
                net(inputs(step)).backward()
            optimizer.step()
        runs.append(result(net, optimizer))
    runs[1].assert_same(runs[0])


def test_a_wrapped_optimizer() -> None:
    core = pytest.importorskip(
        "lightning.pytorch.core.optimizer", reason="Lightning is not installed"
    )
    net = Net()
    optimizer = row_of["LARS"].make(net.parameters())
    wrapped = core.LightningOptimizer(optimizer)
    fastlars.step_in_backward(net, wrapped, bucket_mb=TINY)
    net(inputs(0)).backward()
    assert early_of(net) >= 3
    optimizer.step()
    assert early_of(net) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model() -> None:
    """One graph: its gradients arrive together, at the end; the bits stay."""
    runs = []
    for early in (False, True):
        torch.compiler.reset()
        net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(0.1)
        optimizer = row_of["LARS"].make(net.parameters())
        if early:
            fastlars.step_in_backward(net, optimizer, bucket_mb=TINY)
        compiled = torch.compile(net, backend="aot_eager")
        for _ in range(3):
            optimizer.zero_grad()
            compiled(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        runs.append(result(net, optimizer))
    runs[1].assert_same(runs[0])
