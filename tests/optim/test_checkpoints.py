"""Checkpoints: resuming is never having stopped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from backend_cases import BF16, F64
from optim.input_cases import through_file
from optimizers import ROWS, SIMPLE, Row, Snapshot, assert_same, parameters, train
from optimizers import one_thread as one_thread
from tolerances import assert_same_bits

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


def assert_same_states(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    groups = zip(a.param_groups, b.param_groups, strict=True)
    for p, q in [pair for g, h in groups for pair in zip(g["params"], h["params"], strict=True)]:
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert_same_bits(name, value, b.state[q][name])


def rated(optimizer: Any) -> Any:
    """A rate that changes at every step: what depends on the last one shows."""
    return lambda step: optimizer.param_groups[-1].update(lr=0.1 / (1 + step))


@every_row
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_resuming_is_never_having_stopped(row: Row, steps: int) -> None:
    params = parameters(row.dtype)
    optimizer = row.make([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}])
    train(optimizer, params, range(steps), rated(optimizer))
    weights, saved = through_file(([p.detach() for p in params], optimizer.state_dict()))

    resumed = [nn.Parameter(value) for value in weights]
    # Other values of every kind: all must come from the checkpoint.
    other = {"lr": 7.0, "weight_decay": 0.9, "maximize": True}
    other |= {"adapt": False} if row.adapts else {"center_steps": 9.0, "period_steps": 0.5}
    again = row.make([{"params": resumed[:2]}, {"params": resumed[2:]}], **other)
    again.load_state_dict(saved)
    assert_same_states(again, optimizer)
    more = range(steps, steps + 3)
    train(optimizer, params, more, rated(optimizer))
    train(again, resumed, more, rated(again))
    assert_same("parameter", resumed, params)
    assert_same_states(again, optimizer)


@each_class
def test_resuming_stochastic_rounding(row: Row) -> None:
    params = parameters(BF16)
    optimizer = row.make(params, stochastic_rounding=True)
    train(optimizer, params, range(2))
    saved = through_file((optimizer.state_dict(), [p.detach() for p in params]))
    generator = torch.get_rng_state()
    train(optimizer, params, range(2, 4))
    resumed = [nn.Parameter(value) for value in saved[1]]
    again = row.make(resumed, stochastic_rounding=True)
    again.load_state_dict(saved[0])
    torch.set_rng_state(generator)
    train(again, resumed, range(2, 4))
    assert_same("parameter", resumed, params)


@every_row
def test_loading_replaces_what_was_there(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params), row.make(others)
    train(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    train(optimizer, params, range(2, 4))
    expected = [p.detach().clone() for p in params]
    train(other, others, range(5, 9))
    for p, value in zip(others, weights, strict=True):
        p.data.copy_(value)
    other.load_state_dict(saved)
    train(other, others, range(2, 4))
    assert_same("parameter", others, expected)


@every_row
def test_loading_does_not_alias(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params), row.make(others)
    train(optimizer, params, range(2))
    kept = Snapshot(optimizer)
    other.load_state_dict(optimizer.state_dict())
    train(other, others, range(2, 5), rated(other))
    kept.assert_unchanged()
    own = {p.data_ptr() for p in params if p.numel()}
    states = [value for state in other.state.values() for value in state.values()]
    assert not own & {value.data_ptr() for value in states}


@each_class
def test_types_of_states_survive(row: Row) -> None:
    # torch itself would cast float32 moments of bfloat16 weights to bfloat16.
    params, others = parameters(BF16), parameters(BF16)
    optimizer, other = row.make(params, master_weights=True), row.make(others, master_weights=True)
    train(optimizer, params, range(2))
    other.load_state_dict(through_file(optimizer.state_dict()))
    states = [value for state in other.state.values() for value in state.values()]
    assert len(states) >= 2 * len(params)
    assert all(value.dtype == torch.float32 for value in states)
    assert_same_states(other, optimizer)


@each_class
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_states_take_the_layout_of_their_parameters(row: Row, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(2)
    value = torch.randn(4, 3, 2, 2, generator=generator)
    flipped = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    params, others = (
        [nn.Parameter(value.clone(memory_format=format))] for format in (layout, flipped)
    )
    optimizer, other = row.make(params), row.make(others)
    train(optimizer, params, range(2))
    others[0].data.copy_(params[0].data)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for name in type(other).rule_of(other.param_groups[0]).states:
        assert other.state[others[0]][name].stride() == others[0].stride()
    train(optimizer, params, range(2, 4))
    train(other, others, range(2, 4))
    torch.testing.assert_close(others[0], params[0], rtol=1e-6, atol=1e-7)


@each_class
def test_a_dict_without_newer_options_gets_their_defaults(row: Row) -> None:
    params, others = parameters(), parameters()
    optimizer, other = row.make(params), row.make(others)
    train(optimizer, params, range(2))
    old = copy.deepcopy(optimizer.state_dict())
    own = next(n for n in ("trust_clip", "normalize_grad", "transition") if n in optimizer.defaults)
    for name in (own, "stochastic_rounding", "max_grad_norm", "state_dtype"):
        del old["param_groups"][0][name]
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.data)
    other.load_state_dict(old)
    train(optimizer, params, range(2, 4))
    train(other, others, range(2, 4))
    assert_same("parameter", others, params)


@each_class
def test_float64_states_of_float32_parameters(row: Row) -> None:
    """A checkpoint of a model in another precision: values are converted, parameters stay."""
    params, others = parameters(F64), parameters()
    optimizer, other = row.make(params), row.make(others)
    train(optimizer, params, range(2))
    other.load_state_dict(through_file(optimizer.state_dict()))
    train(other, others, [2])
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(value.dtype == torch.float32 for value in other.state[q].values())
