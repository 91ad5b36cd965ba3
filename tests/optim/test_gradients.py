"""Gradients, graphs, closures and hooks, for every row of the table of optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from backend_cases import BF16
from optimizers import ROWS, SIMPLE, Row, assert_same, parameters, set_gradients, train
from optimizers import one_thread as one_thread

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


# Gradients and graphs.


@every_row
def test_gradients_are_never_modified(row: Row) -> None:
    params = parameters(row.dtype)
    optimizer = row.make(params, maximize=True, max_grad_norm=0.01)
    for step in range(2):
        set_gradients(params, step)
        given = [p.grad for p in params]
        kept = [g.clone() for g in given]
        versions = [g._version for g in given]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, given, strict=True))
        assert [g._version for g in given] == versions
        assert_same("gradient", given, kept)


@every_row
def test_gradients_with_other_strides(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params), row.make(others)

    def restride(step: int) -> None:
        params[0].grad = params[0].grad.t().contiguous().t()
        params[3].grad = params[3].grad.contiguous()
        assert params[3].grad.stride() != params[3].stride()

    train(optimizer, params, range(3), restride)
    train(other, others, range(3))
    assert_same("parameter", params, others)
    for p, q in zip(params, others, strict=True):
        assert_same("state", optimizer.state[p].values(), other.state[q].values())


@every_row
def test_a_stale_graph_raises(row: Row) -> None:
    params = parameters(row.dtype)
    optimizer = row.make(params)
    set_gradients(params, 0)
    loss = sum((p * p).sum() for p in params if p.numel() > 0)
    versions = [p._version for p in params]
    optimizer.step()
    assert all(p._version > was for p, was in zip(params, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_row
def test_maximize(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    up, down = row.make(params, maximize=True), row.make(others)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step, scale=-1.0)
        up.step()
        down.step()
    assert_same("parameter", params, others)


@each_class
def test_maximize_is_not_minimize(row: Row) -> None:
    params, others = parameters(), parameters()
    up, down = row.make(params, maximize=True), row.make(others)
    train(up, params, range(2))
    train(down, others, range(2))
    assert not torch.equal(params[0], others[0])


# Closures and hooks.


@every_row
def test_closure(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params), row.make(others)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        set_gradients(params, 0)
        return 3.25

    with torch.no_grad():
        assert optimizer.step(closure) == 3.25
    assert calls == [True]
    train(other, others, [0])
    assert_same("parameter", params, others)
    assert other.step() is None


@each_class
def test_step_hooks(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params)
    weights: list[Tensor] = []

    def record(*_: Any) -> None:
        weights.append(params[0].detach().clone())

    before = optimizer.register_step_pre_hook(record)
    optimizer.register_step_post_hook(record)
    train(optimizer, params, [0])
    assert len(weights) == 2
    assert not torch.equal(weights[0], weights[1])
    before.remove()
    train(optimizer, params, [1])
    assert len(weights) == 3


@each_class
def test_hooks_of_all_optimizers(row: Row) -> None:
    params = parameters()
    made = row.make(params)
    train(made, params, [0])
    seen: list[Any] = []
    hooks = [
        register(lambda o, *_: seen.append(o))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    for hook in hooks:
        train(made, params, [1])
        hook.remove()
    train(made, params, [2])
    assert seen == [made] * 3


@each_class
def test_a_profiler_sees_the_step_and_nobody_else_pays_for_it(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters()
    optimizer = row.make(params)
    train(optimizer, params, [0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, params, [1])
    name = f"Optimizer.step#{type(optimizer).__name__}.step"
    assert [event.name for event in profile.events()].count(name) == 1

    def fails(*_: Any) -> None:
        raise AssertionError("a region was begun")

    monkeypatch.setattr(torch.autograd.profiler, "record_function", fails)
    train(optimizer, params, [2])


@each_class
def test_a_pre_hook_may_change_gradients(row: Row) -> None:
    params, others = parameters(), parameters()
    optimizer, other = row.make(params), row.make(others)

    def halve(*_: Any) -> None:
        for p in params:
            p.grad = 0.5 * p.grad

    optimizer.register_step_pre_hook(halve)
    train(optimizer, params, range(2))
    for step in range(2):
        set_gradients(others, step, scale=0.5)
        other.step()
    assert_same("parameter", params, others)


@each_class
def test_state_dict_hooks(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params)
    train(optimizer, params, [0])
    calls: list[str] = []

    def drop_note(_: Any, state_dict: dict[str, Any]) -> None:
        calls.append("pre")
        assert state_dict.pop("note") == "mine"

    def see_types(loaded: Any) -> None:
        calls.append("post")
        states = [value for state in loaded.state.values() for value in state.values()]
        assert states
        assert all(value.dtype == torch.float32 for value in states)

    fresh = row.make(parameters(BF16))
    fresh.register_load_state_dict_pre_hook(drop_note)
    fresh.register_load_state_dict_post_hook(see_types)
    fresh.load_state_dict({**optimizer.state_dict(), "note": "mine"})
    assert calls == ["pre", "post"]
