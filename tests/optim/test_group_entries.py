"""What scripts read off an optimizer: the steps in the groups of LAMB, the `optim` of LARC."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastlars
from fastlars import conventions, migrate
from fastlars.optim.group_entries import count_step
from optim.input_cases import through_file
from optimizers import SIMPLE, Row, parameters, set_gradients, train
from optimizers import one_thread as one_thread

COUNTING = [row for row in SIMPLE if row.kind is not fastlars.LARS]
each_counting = pytest.mark.parametrize("row", COUNTING, ids=repr)


def steps(optimizer: Any) -> list[Any]:
    return [group["step"] for group in optimizer.param_groups]


def grouped(row: Row) -> tuple[Any, list[nn.Parameter]]:
    params = parameters()
    return row.make([{"params": params[:2]}, {"params": params[2:]}]), params


@each_counting
def test_groups_count_their_steps(row: Row) -> None:
    optimizer, params = grouped(row)
    assert steps(optimizer) == [0, 0]
    train(optimizer, params, range(3))
    assert steps(optimizer) == [3, 3]
    assert all(type(step) is int for step in steps(optimizer))
    set_gradients(params, 3)
    for p in params[:2]:
        p.grad = None
    optimizer.step()
    assert steps(optimizer) == [3, 4]
    optimizer.zero_grad()
    optimizer.step()
    assert steps(optimizer) == [3, 4]
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert steps(other) == [3, 4]
    again, others = grouped(row)
    again.load_state_dict(through_file(optimizer.state_dict()))
    assert steps(again) == [3, 4]
    train(again, others, [5])
    assert steps(again) == [4, 5]
    again.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert steps(again) == [4, 5, 0]


@each_counting
def test_a_dict_without_the_count_has_it_in_its_states(row: Row) -> None:
    optimizer, params = grouped(row)
    train(optimizer, params, range(3))
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["step"]
    again, _ = grouped(row)
    again.load_state_dict(old)
    assert steps(again) == [3, 3]


@each_counting
@pytest.mark.parametrize("fused", [None, True])
def test_a_skipped_step_does_not_count(row: Row, fused: bool | None) -> None:
    w = nn.Parameter(torch.ones(4))
    optimizer = row.make([w], fused_unscale=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(w.sum()).backward()
        assert w.grad is not None
        if bad:
            w.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert steps(optimizer) == [2]


@each_counting
def test_where_the_device_decides_its_own_counter_is_shown(row: Row) -> None:
    """Without a GPU: the flag is what a back end would answer that reads there."""
    w = nn.Parameter(torch.ones(4))
    optimizer = row.make([w])
    w.grad = torch.ones(4)
    optimizer.step()
    count_step(optimizer.param_groups[0], optimizer.state, host_knows=False)
    assert optimizer.param_groups[0]["step"] is optimizer.state[w]["step"]
    optimizer.step()
    assert int(optimizer.param_groups[0]["step"]) == 2
    again = row.make([nn.Parameter(torch.ones(4))])
    again.load_state_dict(optimizer.state_dict())
    assert steps(again) == [2]


@each_counting
def test_compiled_steps_are_counted_in_the_states_alone(row: Row) -> None:
    """torch.compile guards every value of a group: a count there would compile every step anew."""
    torch._dynamo.reset()
    params = parameters()[:2]
    optimizer = row.make(params)
    counter = CompileCounter()
    compiled = torch.compile(optimizer.step, backend=counter)
    for step in range(5):
        set_gradients(params, step)
        compiled()
    assert steps(optimizer) == [0]
    assert optimizer.state[params[0]]["step"] == 5
    assert counter.frame_count == 1


def test_counts_of_other_libraries_are_taken_over() -> None:
    w, v = (nn.Parameter(torch.ones(3)) for _ in range(2))
    adam = torch.optim.AdamW([w], weight_decay=0.0)
    for _ in range(5):
        w.grad = torch.ones(3)
        adam.step()
    loaded, migrated = (fastlars.LAMB([v], **conventions.torch_adamw) for _ in range(2))
    loaded.load_state_dict(adam.state_dict())
    migrate.load(migrated, adam.state_dict(), conventions.torch_adamw)
    assert steps(loaded) == steps(migrated) == [5]


def test_nvidias_warm_up_warms_up() -> None:
    """Its scheduler takes the count of the first group, or 1 where it finds none."""
    w = nn.Parameter(torch.ones(4))
    optimizer = fastlars.LAMB([w], lr=0.0, **conventions.apex_lamb)
    rates = []
    for _ in range(4):
        w.grad = torch.ones(4)
        optimizer.step()
        done = optimizer.param_groups[0].get("step", 1)
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, done / 3)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])


def test_lars_is_its_own_optim() -> None:
    optimizer = fastlars.LARS([nn.Parameter(torch.ones(2))], lr=4.8, **conventions.apex_larc)
    assert optimizer.optim.param_groups[0]["lr"] == 4.8
    assert copy.deepcopy(optimizer).optim.param_groups is not optimizer.param_groups
