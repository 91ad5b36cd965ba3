"""State dicts in other hands: saved and loaded again they are the same, whoever stands between."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastlars
from optim.input_cases import through_file
from optimizers import ROWS, SIMPLE, Row, Snapshot, assert_same, parameters, train
from optimizers import one_thread as one_thread
from tolerances import assert_same_bits

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


def assert_identical(now: Any, was: Any, where: str = "state_dict") -> None:
    """Equal keys, types and values, all the way down."""
    assert type(now) is type(was), (where, now, was)
    if isinstance(was, Tensor):
        assert_same_bits(where, now, was)
    elif isinstance(was, dict):
        assert now.keys() == was.keys(), (where, set(now) ^ set(was))
        for key in was:
            assert_identical(now[key], was[key], f"{where}[{key!r}]")
    elif isinstance(was, (list, tuple)):
        assert len(now) == len(was), where
        for i, pair in enumerate(zip(now, was, strict=True)):
            assert_identical(*pair, f"{where}[{i}]")
    else:
        assert now == was, where


def grouped(row: Row, named: bool = False, **more: Any) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(row.dtype)
    given = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
    return row.make(
        [{"params": given[:2]}, {"params": given[2:], "weight_decay": 0.0}], **more
    ), params


@every_row
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_save_load_save_is_an_identity(row: Row, named: bool, steps: int) -> None:
    optimizer, params = grouped(row, named)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # what a scheduler keeps there
    train(optimizer, params, range(steps))
    saved = through_file(optimizer.state_dict())
    other, _ = grouped(row)
    for _ in range(2):
        other.load_state_dict(saved)
        assert_identical(other.state_dict(), saved)
    assert_identical(pickle.loads(pickle.dumps(optimizer)).state_dict(), saved)
    assert_identical(copy.deepcopy(optimizer).state_dict(), saved)
    assert other.defaults.keys() == row.make(parameters(row.dtype)).defaults.keys()


class Model(nn.Module):
    """The parameters of the other tests, with names."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        # Without the empty one, for which torch.distributed.checkpoint has no place.
        for i, p in enumerate(parameters(row.dtype)[:4]):
            self.register_parameter(f"p{i}", p)


@every_row
@pytest.mark.parametrize("flat", [False, True])
def test_torch_distributed_checkpoint_loads_again_and_again(row: Row, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    models = [Model(row), Model(row)]
    optimizers = [
        row.make([{"params": [m.p0, m.p1]}, {"params": [m.p2, m.p3], "weight_decay": 0.0}])
        for m in models
    ]
    train(optimizers[0], list(models[0].parameters()), range(2))
    for p, q in zip(models[1].parameters(), models[0].parameters(), strict=True):
        p.data.copy_(q.data)
    for _ in range(2):
        saved = get_optimizer_state_dict(models[0], optimizers[0], options=options)
        saved = through_file(saved)
        set_optimizer_state_dict(models[1], optimizers[1], saved, options=options)
        again = get_optimizer_state_dict(models[1], optimizers[1], options=options)
        assert_identical(again, saved)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(optimizer, list(model.parameters()), [2])
        assert_same("parameter", models[1].parameters(), models[0].parameters())


# What wrappers keep in optimizer.state.


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_states_of_wrappers_move_and_cast_as_in_torch(row: Row, dtype: torch.dtype) -> None:
    theirs = {
        "slow": torch.arange(30.0, requires_grad=True).detach().reshape(6, 5),
        "nested": {"ema": torch.ones(3), "kept": [torch.zeros(2), 3], "step": torch.tensor(2)},
        "count": torch.tensor(7),
        "whole": 5,
        "nothing": None,
    }
    seen, sources = [], []
    for kind in (row.make, torch.optim.SGD):
        first = nn.Parameter(torch.ones(6, 5))
        optimizer = kind([first], lr=0.1)
        first.grad = torch.ones(6, 5)
        optimizer.step()
        optimizer.state[first].update(copy.deepcopy(theirs))
        saved = optimizer.state_dict()
        second = nn.Parameter(torch.ones(6, 5, dtype=dtype))
        other = kind([second], lr=0.1)
        other.load_state_dict(saved)
        loaded = other.state[second]
        seen.append({name: loaded[name] for name in theirs})
        sources.append(saved["state"][0])
        second.grad = torch.ones_like(second)
        other.step()
    assert_identical(*seen)
    copy.deepcopy(other)
    shared = {x.data_ptr() for x in _tensors(sources[0])} & {
        x.data_ptr() for x in _tensors(seen[0])
    }
    assert not shared


@each_class
def test_states_that_torch_spoils(row: Row) -> None:
    """torch makes a generator of a text, and fails for arrays and named tuples."""
    pair = namedtuple("pair", "a b")
    theirs = {
        "text": "kept",
        "pair": pair(1, 2),
        "array": numpy.ones(2),
        "set": {1, 2},
        "dict": defaultdict(list, a=[1]),
    }
    optimizer, params = grouped(row)
    train(optimizer, params, [0])
    optimizer.state[params[0]].update(theirs)
    other, others = grouped(row)
    other.load_state_dict(optimizer.state_dict())
    theirs["dict"] = {"a": [1]}
    assert repr({name: other.state[others[0]][name] for name in theirs}) == repr(theirs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for v in values for t in _tensors(v)] if isinstance(value, (dict, list)) else []


def test_states_of_no_parameter_are_copied() -> None:
    optimizer = fastlars.LARS(parameters(), lr=0.1)
    optimizer.state["ema"] = {"decay": torch.ones(2), "weights": [nn.Parameter(torch.ones(3))]}
    saved = optimizer.state_dict()
    again = fastlars.LARS(parameters(), lr=0.1)
    again.load_state_dict(saved)
    assert again.state["ema"]["weights"][0].tolist() == [1.0] * 3
    shared = {x.data_ptr() for x in _tensors(saved["state"]["ema"])}
    assert not shared & {x.data_ptr() for x in _tensors(again.state["ema"])}
    copy.deepcopy(again)


@each_class
def test_a_plain_dict_of_states(row: Row) -> None:
    """Lightning and others rebuild the states, as other dicts."""
    optimizer, params = grouped(row)
    other, others = grouped(row)
    optimizer.state = {}
    train(optimizer, params, range(2))
    train(other, others, range(2))
    optimizer.state = {p: dict(state) for p, state in optimizer.state.items()}
    train(optimizer, params, range(2, 4))
    train(other, others, range(2, 4))
    assert_same("parameter", params, others)


# Hooks that leave out, add or rebuild.


def _without_types(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {k: v for k, v in g.items() if k != "state_dtype"} for g in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _in_an_envelope(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer": state_dict}


@each_class
def test_hooks_of_state_dict(row: Row) -> None:
    optimizer, params = grouped(row)
    train(optimizer, params, range(2))
    plain = optimizer.state_dict()
    without = optimizer.register_state_dict_post_hook(_without_types)
    other, _ = grouped(row)
    other.load_state_dict(optimizer.state_dict())
    assert_identical(other.state_dict(), plain)
    without.remove()
    optimizer.register_state_dict_post_hook(_in_an_envelope)
    inside = optimizer.state_dict()
    assert inside.keys() == {"optimizer"}
    other.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict["optimizer"])
    other.load_state_dict(inside)
    assert_identical(other.state_dict(), plain)


@each_class
def test_what_a_hook_returns_is_returned(row: Row) -> None:
    results: list[Any] = [
        OrderedDict(a=1),
        [1, 2],
        {"param_groups": None},
        {"param_groups": {0: 1}},
    ]
    for result in results:
        optimizer, _ = grouped(row)
        optimizer.register_state_dict_post_hook(lambda *_, result=result: result)
        assert optimizer.state_dict() is result


@pytest.mark.parametrize("other", SIMPLE, ids=repr)
@each_class
def test_a_state_dict_of_another_class_is_refused(row: Row, other: Row) -> None:
    if row.kind is other.kind:
        assert row.kind.own_options <= row.make(parameters()).defaults.keys()
        return
    optimizer, params = grouped(row)
    train(optimizer, params, range(1))
    theirs, _ = grouped(other)
    before = Snapshot(theirs)
    with pytest.raises(ValueError, match=f"not of {other.kind.__name__}"):
        theirs.load_state_dict(optimizer.state_dict())
    before.assert_unchanged()


@each_class
def test_groups_of_which_a_hook_left_little(row: Row) -> None:
    """Who wants to go on with rates and decays of the new run takes the old ones out."""
    optimizer, params = grouped(row)
    train(optimizer, params, range(2))
    mark = next(iter(sorted(row.kind.own_options)))
    kept = {"params", mark}

    def leave_out(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{k: v for k, v in g.items() if k in kept} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other, others = grouped(row, lr=0.25)
    other.register_load_state_dict_pre_hook(leave_out)
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in other.param_groups][1] == 0.0  # the group's own
    train(other, others, [2])


@each_class
def test_a_state_before_the_first_forward_pass_of_a_lazy_module(row: Row) -> None:
    models = [nn.Sequential(nn.LazyLinear(3)) for _ in range(2)]
    optimizers = [row.make(model.parameters()) for model in models]
    models[0](torch.ones(2, 4)).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    models[1](torch.ones(2, 4))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        q.data.copy_(p)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(optimizer, list(model.parameters()), [1])
    assert_same("parameter", *(model.parameters() for model in models))
    wrong = row.make(nn.Sequential(nn.LazyLinear(3)).parameters())
    wrong.load_state_dict(optimizers[0].state_dict())
    (weight, _) = wrong.param_groups[0]["params"]
    weight.materialize((3, 5))
    weight.grad = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"group 0, parameter 0 has shape \(3, 5\), its "):
        wrong.step()


# Steps and checkpoints take the same.


@each_class
def test_a_wrapper_that_began_before_the_first_step(row: Row) -> None:
    optimizer, params = grouped(row)
    optimizer.state[params[0]]["slow"] = torch.ones(6, 5)
    again, others = grouped(row)
    again.load_state_dict(optimizer.state_dict())
    assert list(again.state[others[0]]) == ["slow"]
    train(again, others, [0])


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ({"dampening": 0.1}, torch.float32),
        ({"momentum_correction": True}, torch.float32),
        ({"master_weights": True}, torch.bfloat16),
    ],
)
def test_an_option_switched_on_between_two_steps(option: Any, dtype: torch.dtype) -> None:
    runs = []
    for loads in (False, True):
        params = parameters(dtype)
        optimizer = fastlars.LARS(params, lr=0.5, trust_coefficient=0.1)
        train(optimizer, params, range(2))
        optimizer.param_groups[0].update(option)
        if loads:
            optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, params, range(2, 4))
        runs.append(params)
    assert_same("parameter", *runs)


@pytest.mark.parametrize("step", ["x", float("nan"), torch.ones(2), True])
def test_a_count_that_is_none_changes_nothing(step: Any) -> None:
    optimizer = fastlars.LAMB(parameters())
    train(optimizer, optimizer.param_groups[0]["params"], [0])
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0] |= {"step": step, "lr": 7.0}
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match="state_dict, group 0: step must be"):
        optimizer.load_state_dict(bad)
    before.assert_unchanged()
    with pytest.raises((TypeError, ValueError), match="group 1: step must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "step": step})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("count", [numpy.int64(5), 5, 5.0, torch.tensor(5), torch.tensor([5.0])])
def test_counts_of_any_type(count: Any) -> None:
    optimizer = fastlars.LAMB(parameters())
    train(optimizer, optimizer.param_groups[0]["params"], [0])
    state = optimizer.state_dict()
    state["state"][0]["step"] = count
    optimizer.load_state_dict(state)
    step = optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
    assert_same_bits("step", step, torch.tensor(5.0))
