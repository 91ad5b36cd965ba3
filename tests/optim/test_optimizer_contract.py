"""Drop-in means drop-in: what torch.optim.Optimizer promises, for every row of the table."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fastlars
from backend_cases import BF16, F64
from optimizers import ROWS, SIMPLE, Row, Snapshot, assert_same, parameters, set_gradients, train
from optimizers import one_thread as one_thread
from tolerances import assert_same_bits

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


@each_class
def test_a_docstring_has_every_argument(row: Row) -> None:
    text = row.kind.__doc__ or ""
    assert "{shared" not in text
    for name in signature(row.kind).parameters:
        assert f"\n    {name}: " in text, name
    assert text.count("\nRaises:\n") == text.count("\nExample:\n") == 1


@each_class
def test_defaults_and_words_are_those_of_the_rule(row: Row) -> None:
    """A signature repeats them, for whoever reads it."""
    given = signature(row.kind).parameters
    known = {each.name: each for each in fields(row.kind.rule)}
    needed = {name: value for name, value in row.needed.items() if name in known}
    defaults = {name: parameter.default for name, parameter in given.items()}
    assert row.kind.rule_of(defaults | needed) == row.kind.rule(**needed)
    # LAMB's signature has words of its own.
    own = {"bias_correction", "nesterov"} if row.kind is fastlars.LAMB else set()
    for name in known.keys() & given.keys():
        if name not in own:
            assert given[name].annotation == known[name].type, name


# Learning rates and schedulers.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    # It moves the momentum, or beta1, as well.
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),
    "polynomial": lambda o: fastlars.schedules.polynomial(o, steps=6, warmup_steps=2),
}


@each_class
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(row: Row, name: str) -> None:
    params = parameters()
    optimizer = row.make(params)
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for step in range(5):
        group = optimizer.param_groups[0]
        seen.append({key: group[key] for key in ("lr", "momentum", "betas") if key in group})
        train(optimizer, params, [step])
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len({float(values["lr"]) for values in seen}) > 1
    if name == "OneCycleLR":
        assert len({str(values) for values in seen}) == 5

    by_hand = parameters()
    other = row.make(by_hand)
    train(other, by_hand, range(5), lambda step: other.param_groups[0].update(seen[step]))
    assert_same(f"{name}, parameter", params, by_hand)


@every_row
def test_lr_as_a_tensor(row: Row) -> None:
    params, others = parameters(row.dtype), parameters(row.dtype)
    lr = torch.tensor(row.options["lr"], dtype=F64)
    optimizer, other = row.make(params, lr=lr), row.make(others)
    train(optimizer, params, range(2))
    train(other, others, range(2))
    lr.mul_(0.5)
    other.param_groups[0]["lr"] *= 0.5
    train(optimizer, params, range(2, 4))
    train(other, others, range(2, 4))
    assert_same("parameter", params, others)


@every_row
def test_groups_have_their_own_hyper_parameters(row: Row) -> None:
    params, alone, alone_too = parameters(row.dtype), parameters(row.dtype), parameters(row.dtype)
    changed = {"lr": 0.03, "weight_decay": 0.2}
    if row.adapts:
        changed["adapt"] = not row.options.get("adapt", True)
    optimizer = row.make([{"params": params[:2]}, {"params": params[2:], **changed}])
    train(optimizer, params, range(3))
    first, second = row.make(alone[:2]), row.make(alone_too[2:], **changed)
    train(first, alone, range(3))
    train(second, alone_too, range(3))
    assert_same("parameter", params, alone[:2] + alone_too[2:])


@each_class
def test_a_changed_option_counts_from_the_next_step(row: Row) -> None:
    params, others = parameters(BF16), parameters(BF16)
    optimizer, other = row.make(params), row.make(others, master_weights=True)
    optimizer.param_groups[0]["master_weights"] = True
    train(optimizer, params, range(3))
    train(other, others, range(3))
    assert_same("parameter", params, others)

    params, others = parameters(BF16), parameters(BF16)
    optimizer, other = row.make(params), row.make(others)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["master_weights"] = True
    train(optimizer, params, range(2, 5))
    train(other, others, range(2))
    assert all("master" in optimizer.state[p] for p in params)
    resumed = row.make(others, master_weights=True)
    resumed.state = other.state
    train(resumed, others, range(2, 5))
    assert_same("parameter", params, others)


@every_row
def test_the_default_device_does_not_show(row: Row) -> None:
    """As scripts for GPUs begin, with parameters that stay on the CPU; meta is always there."""
    params, others = parameters(row.dtype), parameters(row.dtype)
    optimizer, other = row.make(params, max_grad_norm=0.1), row.make(others, max_grad_norm=0.1)
    for step in range(2):
        set_gradients(params, step)
        set_gradients(others, step)
        with torch.device("meta"):
            optimizer.step()
        other.step()
    assert_same("parameter", params, others)
    assert [*optimizer.trust_ratios().values()] == [*other.trust_ratios().values()]


@each_class
@pytest.mark.parametrize("strided", [False, True])
def test_stochastic_rounding_under_a_default_device(row: Row, strided: bool) -> None:
    twins = []
    for device in ("cpu", "meta"):
        value = torch.ones(6, 8, dtype=BF16)[:, :: 1 + strided]
        p = nn.Parameter(value)
        set_gradients([p], 0)
        torch.manual_seed(4)
        with torch.device(device):
            row.make([p], stochastic_rounding=True).step()
        twins.append(p)
    assert_same_bits("parameter", *twins)


# Parameters that come and go.


@every_row
def test_parameter_groups_added_later(row: Row) -> None:
    params, alone = parameters(row.dtype), parameters(row.dtype)
    optimizer = row.make(params[:2])
    train(optimizer, params, range(2))
    optimizer.add_param_group({"params": params[2:], "lr": 0.01})
    train(optimizer, params, range(2, 4))
    early, late = row.make(alone[:2]), row.make(alone[2:], lr=0.01)
    train(early, alone, range(4))
    train(late, alone, range(2, 4))
    assert_same("parameter", params, alone)


@every_row
def test_parameters_without_gradients_are_left_alone(row: Row) -> None:
    """They neither move nor count the step; gradients may come and go."""
    has_gradient = [(0, 1, 3), (0, 2), (), (0, 1, 2, 3, 4), (1,)]
    params, alone = parameters(row.dtype), parameters(row.dtype)
    optimizer, single = row.make(params), [row.make([p]) for p in alone]
    for step, present in enumerate(has_gradient):
        for values in (params, alone):
            set_gradients(values, step)
            for i, p in enumerate(values):
                if i not in present:
                    p.grad = None
        optimizer.step()
        assert set(optimizer.trust_ratios()) == {params[i] for i in present}
        for one in single:
            one.step()
    assert_same("parameter", params, alone)
    for p, one, q in zip(params, single, alone, strict=True):
        assert optimizer.state[p].keys() == one.state[q].keys()
        assert_same("state", optimizer.state[p].values(), one.state[q].values())


@every_row
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(row: Row, set_to_none: bool) -> None:
    params = parameters(row.dtype)
    optimizer = row.make(params)
    train(optimizer, params, range(2))
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad(set_to_none=set_to_none)
    before = Snapshot(optimizer)
    if set_to_none:
        gc.collect()
        assert all(grad() is None for grad in grads), "the optimizer keeps gradients alive"
        optimizer.step()
        before.assert_unchanged()
        return
    assert all(not p.grad.any() for p in params)
    moved = [p.detach().clone() for p in params]
    optimizer.step()  # decay and momentum go on
    assert any(not torch.equal(p, was) for p, was in zip(params, moved, strict=True))


@each_class
def test_types_and_layouts_mixed_in_one_group(row: Row) -> None:
    def mixed() -> list[nn.Parameter]:
        lists = [parameters(dtype) for dtype in (torch.float32, BF16, F64, torch.float16)]
        strided = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))[:, ::2]
        return [p for four in zip(*lists, strict=True) for p in four] + [nn.Parameter(strided)]

    params, alone = mixed(), mixed()
    for p in (params[-1], alone[-1]):
        assert p.stride() == (8, 2)
    optimizer, single = row.make(params, master_weights=True), []
    for i, p in enumerate(alone):
        single.append(row.make([p], master_weights=True))
        assert p.dtype == params[i].dtype
    for step in range(3):
        for values in (params, alone):
            set_gradients(values, step)
        optimizer.step()
        for one in single:
            one.step()
    assert_same("parameter", params, alone)


# Copies.


def _through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_row
@pytest.mark.parametrize("through", [_through_pickle, _through_torch_save, copy.deepcopy])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_go_on_by_themselves(row: Row, through: Callable[[Any], Any], steps: int) -> None:
    params = parameters(row.dtype)
    optimizer = row.make([{"params": params[:2], "lr": 0.01}, {"params": params[2:]}])
    train(optimizer, params, range(steps))
    twin = through(optimizer)
    copies = [p for group in twin.param_groups for p in group["params"]]
    assert not {p.data_ptr() for p in copies if p.numel()} & {p.data_ptr() for p in params}
    assert_same("copy", copies, params)
    before = Snapshot(optimizer)
    train(twin, copies, range(steps, steps + 3))
    for p in params:
        p.grad = before.taken.get("no gradient") if p.grad is None else p.grad
    before.assert_unchanged()
    train(optimizer, params, range(steps, steps + 3))
    assert_same("parameter", copies, params)


@each_class
def test_a_shallow_copy_reads_its_own_steps(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params, max_grad_norm=1e6, skip_if=1e5)
    train(optimizer, params, range(1))
    norm, ratios = optimizer.grad_norm, optimizer.trust_ratios()
    twin = copy.copy(optimizer)
    twin.skip_if = None
    assert twin.grad_norm is None
    assert not twin.trust_ratios()
    assert torch.equal(optimizer.grad_norm, norm)
    assert optimizer.trust_ratios() == ratios
    assert optimizer.skip_if == 1e5


def test_an_option_of_a_subclass_is_checked_when_it_changes() -> None:
    class WithOption(fastlars.LARS):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.defaults["extra"] = 0
            for group in self.param_groups:
                group["extra"] = 0

        @classmethod
        def rule_of(cls, group: dict[str, Any]) -> Any:
            if group.get("extra", 0) < 0:
                raise ValueError("extra must be at least 0")
            return super().rule_of(group)

    params = parameters()
    optimizer = WithOption(params)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["extra"] = -1
    with pytest.raises(ValueError, match="group 0: extra must be at least 0"):
        optimizer.step()


@each_class
def test_repr_names_the_class_and_its_options(row: Row) -> None:
    text = repr(row.make(parameters()))
    assert text.startswith(type(row.make(parameters())).__name__)
    assert "weight_decay: 0.01" in text
