"""A state dict taken before the first step, which torch takes a step of zeros for.

docs/distributed.md says which runs end with other bits then, and what helps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastlars
from distributed.processes import run
from distributed.sharded_cases import whole
from optimizers import SIMPLE

Make = Callable[..., Any]
LARS = partial(fastlars.LARS, lr=1.0, trust_coefficient=0.1)
LAMB = partial(fastlars.LAMB, lr=0.02)
LANS = partial(fastlars.LANS, lr=0.02)
RMSPROP = partial(fastlars.RMSpropWarmup, lr=0.1, center_steps=2, period_steps=3)
DECAY = {"weight_decay": 0.01}
UNCORRECTED = {"bias_correction": False}

SAME: dict[str, Make] = {
    "LARS": partial(LARS, **DECAY),
    "LARS, momentum correction": partial(LARS, **DECAY, momentum_correction=True),
    "LARS, Nesterov": partial(LARS, **DECAY, nesterov=True),
    "LARS, combined ratio": partial(LARS, **DECAY, ratio="combined"),
    "LARS, clip": partial(LARS, **DECAY, max_grad_norm=0.1),
    "LARS, no ratio": partial(LARS, **DECAY, adapt=False),
    "LARS, no momentum": partial(LARS, **DECAY, momentum=0.0, buffer="gradient"),
    "LARS, buffer scaled, no decay": partial(LARS, buffer="scaled"),
    "LARS, buffer gradient, no decay": partial(LARS, buffer="gradient"),
    "LAMB, no correction": partial(LAMB, **DECAY, **UNCORRECTED),
    "LAMB, no correction, decoupled": partial(LAMB, **DECAY, **UNCORRECTED, decay="decoupled"),
    "LAMB, no correction, clip": partial(LAMB, **DECAY, **UNCORRECTED, max_grad_norm=0.1),
    "LAMB, no correction, no ratio": partial(LAMB, **DECAY, **UNCORRECTED, adapt=False),
    "LAMB, no correction, no decay": partial(LAMB, **UNCORRECTED, decay="gradient"),
    "LANS, no correction": partial(LANS, **DECAY, **UNCORRECTED),
    "torch SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
OTHER: dict[str, Make] = {
    "LARS, buffer scaled": partial(LARS, **DECAY, buffer="scaled"),
    "LARS, buffer gradient": partial(LARS, **DECAY, buffer="gradient"),
    "LARS, dampening": partial(LARS, dampening=0.1),
    "LAMB": LAMB,
    "LAMB, correction of the rate": partial(LAMB, bias_correction="rate"),
    "LAMB, decay in the gradient": partial(LAMB, **DECAY, **UNCORRECTED, decay="gradient"),
    "LANS": LANS,
    "LANS, decay in the gradient": partial(LANS, **DECAY, **UNCORRECTED, decay="gradient"),
    "RMSpropWarmup": RMSPROP,
    "RMSpropWarmup, decay": partial(RMSPROP, **DECAY),
    "torch SGD, decay": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "torch AdamW": partial(torch.optim.AdamW, lr=0.01),
}
# Over processes: torch's own are left out.
SHARDED = {name: make for name, make in (SAME | OTHER).items() if "torch" not in name}
MASTERS = {row.kind.__name__: row.make for row in SIMPLE}
STEPS = 4


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def train(net: nn.Module, optimizer: Any, steps: range = range(STEPS)) -> list[Tensor]:
    """The weights after these steps, with a rate that changes."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) / (step + 1)
        torch.manual_seed(100 + step)
        net.zero_grad()
        net(
            torch.randn(5, 6, dtype=next(net.parameters()).dtype)
        ).float().square().mean().backward()
        optimizer.step()
    return [whole(p) for p in net.parameters()]


def trained(make: Make, early: bool, shard: bool = False) -> list[Tensor]:
    """The weights at the end of a run, with or without a state dict before its first step."""
    net = model()
    if shard:
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    optimizer = make(net.parameters())
    if early:
        before = [whole(p) for p in net.parameters()]
        get_optimizer_state_dict(net, optimizer)
        assert same(before, [whole(p) for p in net.parameters()])
        # A step was taken: what looks at no state dict at all would compare nothing.
        assert optimizer.param_groups[0].get("momentum") == 0.0 or len(optimizer.state) == 4
    return train(net, optimizer)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SAME)
def test_these_end_with_the_same_bits(name: str) -> None:
    assert same(trained(SAME[name], early=True), trained(SAME[name], early=False))


@pytest.mark.parametrize("name", OTHER)
def test_these_end_with_other_bits(name: str) -> None:
    assert not same(trained(OTHER[name], early=True), trained(OTHER[name], early=False))


def sharded() -> dict[str, bool]:
    return {
        name: same(trained(make, True, shard=True), trained(make, False, shard=True))
        for name, make in SHARDED.items()
    }


def test_sharded_runs_are_no_different() -> None:
    for found in run(2, sharded):
        assert found == {name: name in SAME for name in SHARDED}


@pytest.mark.parametrize("name", OTHER)
def test_afterwards_it_changes_nothing(name: str) -> None:
    """After the first step; after one that was thrown away; and where it is loaded over."""
    undisturbed = trained(OTHER[name], early=False)

    net = model()
    optimizer = OTHER[name](net.parameters())
    train(net, optimizer, range(1))
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    middle = [whole(p) for p in net.parameters()]
    assert same(train(net, optimizer, range(1, STEPS)), undisturbed)

    net = model()
    optimizer = OTHER[name](net.parameters())
    get_optimizer_state_dict(net, optimizer)
    optimizer.state.clear()
    assert same(train(net, optimizer), undisturbed)

    # A run that was ended after its first step, and goes on in a new process.
    net = model()
    optimizer = OTHER[name](net.parameters())
    net = _with(net, middle)
    get_optimizer_state_dict(net, optimizer)
    set_optimizer_state_dict(net, optimizer, saved)
    assert same(train(net, optimizer, range(1, STEPS)), undisturbed)


def _with(net: nn.Sequential, weights: list[Tensor]) -> nn.Sequential:
    with torch.no_grad():
        for p, weight in zip(net.parameters(), weights, strict=True):
            p.copy_(weight)
    return net


@pytest.mark.parametrize("name", MASTERS)
def test_masters_hold_the_weights_of_then(name: str) -> None:
    """Weights that are loaded later are lost, unless the states are cleared."""
    ends = []
    for early, clear in ((False, False), (True, False), (True, True)):
        net = model(torch.bfloat16)
        optimizer = MASTERS[name](net.parameters(), master_weights=True)
        if early:
            get_optimizer_state_dict(net, optimizer)
        if clear:
            optimizer.state.clear()
        _with(net, [torch.full_like(p, 3.0) for p in net.parameters()])
        ends.append(train(net, optimizer, range(1)))
    right, lost, cleared = ends
    assert same(cleared, right)
    # The step starts from the weights of `model()`, all below 1.
    assert min(float(w.min()) for w in right) > 2.0
    assert max(float(w.max()) for w in lost) < 2.0


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", MASTERS)
def test_stochastic_rounding_draws_from_the_generator(name: str, rounded: bool) -> None:
    net = model(torch.bfloat16)
    optimizer = MASTERS[name](net.parameters(), stochastic_rounding=rounded)
    before = torch.get_rng_state()
    get_optimizer_state_dict(net, optimizer)
    optimizer.state.clear()
    assert torch.equal(torch.get_rng_state(), before) is not rounded


def test_the_counts_are_one_ahead_as_those_of_adamw() -> None:
    for make in (LAMB, RMSPROP, partial(torch.optim.AdamW, lr=0.01)):
        net = model()
        optimizer = make(net.parameters())
        get_optimizer_state_dict(net, optimizer)
        assert [float(s["step"]) for s in optimizer.state.values()] == [1.0] * 4


def test_a_plain_state_dict_takes_no_step() -> None:
    net = model()
    optimizer = LAMB(net.parameters())
    assert optimizer.state_dict()["state"] == {}
    assert not optimizer.state
