"""ZeRO-1 through torch's ZeroRedundancyOptimizer: the states are spread, the steps are the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlars
from distributed.processes import run
from optimizers import OPTIONS
from tolerances import assert_same_bits

STEPS = 4


def _train(model: nn.Module, optimizer: Any, steps: range, schedule: Any) -> None:
    for step in steps:
        torch.manual_seed(10 * step + dist.get_rank())
        model.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        # Not DDP, whose buckets of the first iteration add up ranks in another order.
        for p in model.parameters():
            dist.all_reduce(p.grad)
        optimizer.step()
        schedule.step()


def _halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def both_ways(name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    """Weights without and with ZeRO, weights after a resume in the middle, states held here."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    kind, options = getattr(fastlars, name), OPTIONS[name]
    torch.manual_seed(1)
    start = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3, bias=False))

    def spread(model: nn.Module) -> Any:
        groups = fastlars.parameter_groups(model, weight_decay=0.01)
        for group in groups:
            # ZeroRedundancyOptimizer takes no pairs of name and parameter.
            group["params"] = [p for _, p in group["params"]]
        return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **options)

    usual = copy.deepcopy(start)
    optimizer = kind(fastlars.parameter_groups(usual, weight_decay=0.01), **options)
    _train(usual, optimizer, range(STEPS), _halved(optimizer))

    zero = copy.deepcopy(start)
    first = spread(zero)
    schedule = _halved(first)
    _train(zero, first, range(STEPS // 2), schedule)
    # All states travel to rank 0, which saves them; every rank loads them and keeps its own.
    first.consolidate_state_dict(to=0)
    saved = [first.state_dict() if dist.get_rank() == 0 else None, zero.state_dict()]
    saved = copy.deepcopy(saved)
    dist.broadcast_object_list(saved, src=0)
    _train(zero, first, range(STEPS // 2, STEPS), schedule)

    resumed = copy.deepcopy(start)
    resumed.load_state_dict(saved[1])
    second = spread(resumed)
    second.load_state_dict(saved[0])
    later = _halved(second)
    later.load_state_dict({**schedule.state_dict(), "last_epoch": STEPS // 2})
    _train(resumed, second, range(STEPS // 2, STEPS), later)

    held = sum(len(first.optim.state[p]) > 0 for p in zero.parameters() if p in first.optim.state)
    weights = [[p.detach().clone() for p in m.parameters()] for m in (usual, zero, resumed)]
    return weights[0], weights[1], weights[2], held


def all_kinds() -> dict[str, Any]:
    return {name: both_ways(name) for name in OPTIONS}


def test_zero_has_the_bits_of_ordinary_steps() -> None:
    # Four ranks for three parameters: one has nothing to step.
    outcomes = run(4, all_kinds)
    for name in OPTIONS:
        assert sorted(found[name][3] for found in outcomes) == [0, 1, 1, 1], name
        for usual, zero, resumed, _ in (found[name] for found in outcomes):
            for i, weight in enumerate(usual):
                assert_same_bits(f"{name}, weight {i}", zero[i], weight)
                assert_same_bits(f"{name}, weight {i} after a resume", resumed[i], weight)
