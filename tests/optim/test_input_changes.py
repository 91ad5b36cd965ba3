"""Parameters and states that change under the hands of the optimizer: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlars
from backend_cases import BF16
from optim.input_cases import Case, each_class, values
from optimizers import SIMPLE, Row, assert_same
from optimizers import one_thread as one_thread
from tolerances import assert_same_bits

# What changes under the optimizer's hands (rows 16, 17).


def _shape(p: nn.Parameter) -> None:
    p.data = values(4, 7)
    p.grad = values(4, 7)


def _shorter(p: nn.Parameter) -> None:
    p.data = values(2, 3)
    p.grad = values(2, 3)


def _shape_without_gradient(p: nn.Parameter) -> None:
    p.data = values(24)


def _float64(p: nn.Parameter) -> None:
    p.data = p.data.double()
    p.grad = None
    p.grad = values(4, 6).double()


CHANGES = {
    "another shape": (_shape, ValueError, r"has shape \(4, 7\), its \w+ \(4, 6\)"),
    "fewer elements": (_shorter, ValueError, r"has shape \(2, 3\), its \w+ \(4, 6\)"),
    "another shape than its gradient": (_shape_without_gradient, ValueError, "gradient"),
    "float64": (_float64, ValueError, "is torch.float64 and needs"),
}


@each_class
@pytest.mark.parametrize("name", CHANGES)
def test_parameters_replaced_by_what_does_not_fit_their_states(row: Row, name: str) -> None:
    change, error, message = CHANGES[name]
    case = Case(row)
    case.train(0, 1)
    case.set_gradients(2)
    change(case.victim)
    case.refuses(error, message)


REPLACEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a copy": lambda x: x.clone(),
    "a transposed copy": lambda x: x.t().contiguous().t(),
    "a strided view": lambda x: torch.cat([x, x], 1)[:, :6],
    "a misaligned view": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(4, 6),
}


@each_class
@pytest.mark.parametrize("name", REPLACEMENTS)
@pytest.mark.parametrize("with_new_gradient", [False, True])
def test_parameters_replaced_by_equal_values(row: Row, name: str, with_new_gradient: bool) -> None:
    """A layout may change under the optimizer, as model.to(memory_format=...) does."""
    case, other = Case(row), Case(row)
    case.train(0, 1)
    other.train(0, 1)
    old = case.victim.data
    kept = old.clone()
    case.set_gradients(2)
    case.victim.data = REPLACEMENTS[name](old)
    if with_new_gradient:
        case.set_gradients(2)
    case.optimizer.step()
    case.train(3)
    other.train(2, 3)
    assert_same_bits("memory that the parameter had", old, kept)
    for p, q in zip(case.params, other.params, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-6, atol=1e-7)


@each_class
def test_parameters_made_smaller_in_type(row: Row) -> None:
    """model.bfloat16() after some steps: states stay float32, as for a bfloat16 model."""
    case = Case(row)
    case.train(0, 1)
    case.victim.data = case.victim.data.to(BF16)
    case.victim.grad = None
    case.train(2, 3)
    assert case.victim.dtype == BF16
    states = case.optimizer.state[case.victim].values()
    assert all(x.dtype == torch.float32 for x in states)


@each_class
def test_cleared_state_starts_afresh(row: Row) -> None:
    case, other = Case(row), Case(row)
    case.train(0, 1)
    for p, q in zip(case.params, other.params, strict=True):
        q.data.copy_(p.data)
    case.optimizer.state.clear()
    case.train(2, 3)
    other.train(2, 3)
    assert_same("parameter", case.params, other.params)


@each_class
def test_the_state_of_one_parameter_starts_afresh(row: Row) -> None:
    case, other = Case(row), Case(row)
    case.train(0, 1)
    fresh = row.make([other.victim])
    other.victim.data.copy_(case.victim.data)
    del case.optimizer.state[case.victim]
    case.train(2, 3)
    for step in (2, 3):
        other.set_gradients(step)
        fresh.step()
    assert_same_bits("parameter", case.victim, other.victim)


def _first_state(case: Case) -> str:
    return type(case.optimizer).rule_of(case.optimizer.param_groups[1]).states[0]


@each_class
def test_a_state_that_was_replaced_counts(row: Row) -> None:
    case, other = Case(row), Case(row)
    case.train(0, 1)
    other.train(0, 1)
    state, name = case.optimizer.state[case.victim], _first_state(case)
    old = state[name]
    kept = old.clone()
    state[name] = torch.zeros_like(old)
    other.optimizer.state[other.victim][name].zero_()
    case.train(2, 3)
    other.train(2, 3)
    assert_same("parameter", case.params, other.params)
    assert_same_bits("the old state", old, kept)


WRONG_STATES: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "too short": (lambda x: x.flatten()[:5].clone(), ValueError),
    "of another shape": (lambda x: x.t().contiguous(), ValueError),
    "of another type": (lambda x: x.double(), ValueError),
    "on another device": (lambda x: x.to("meta"), ValueError),
    "no tensor": (lambda x: x.tolist(), TypeError),
    "sparse": (lambda x: x.to_sparse(), TypeError),
    "expanded": (lambda x: x[:1].expand(4, 6), ValueError),
}


@each_class
@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_state_that_no_longer_fits(row: Row, name: str) -> None:
    wrong, error = WRONG_STATES[name]
    case = Case(row)
    case.train(0, 1)
    state, first = case.optimizer.state[case.victim], _first_state(case)
    state[first] = wrong(state[first])
    case.set_gradients(2)
    if name == "expanded":  # as good as any other layout: it gets memory of its own
        case.optimizer.step()
        assert state[first].is_contiguous()
        return
    case.refuses(error, first)


COUNTERS = [
    (SIMPLE[1], "step"),
    (SIMPLE[2], "step"),
    (Row("", fastlars.LARS, {"lr": 0.1, "dampening": 0.1}), "last_lr"),
]


@pytest.mark.parametrize(("row", "name"), COUNTERS, ids=str)
@pytest.mark.parametrize(
    "wrong", ["3", True, None, torch.zeros(2), torch.zeros((), dtype=torch.complex64)], ids=str
)
def test_a_counter_that_no_longer_fits(row: Row, name: str, wrong: Any) -> None:
    case = Case(row)
    case.train(0, 1)
    case.optimizer.state[case.victim][name] = wrong
    case.set_gradients(2)
    case.refuses(ValueError if isinstance(wrong, Tensor) else TypeError, name)


@pytest.mark.parametrize(("row", "name"), COUNTERS, ids=str)
@pytest.mark.parametrize("kind", [float, lambda n: torch.tensor([n]), torch.Tensor.double])
def test_a_counter_of_another_type_counts_on(row: Row, name: str, kind: Any) -> None:
    """Wrappers and checkpoints of other versions make plain numbers or other types of counters."""
    case, other = Case(row), Case(row)
    for each in (case, other):
        each.train(0, 1)
    state = case.optimizer.state[case.victim]
    old = state[name]
    state[name] = kind(old if kind is torch.Tensor.double else old.item())
    for each in (case, other):
        each.train(2)
    assert_same("parameter", case.params, other.params)
    assert_same_bits("counter", state[name], other.optimizer.state[other.victim][name])


@pytest.mark.parametrize("through_dict", [False, True])
@pytest.mark.parametrize(
    "row",
    [*SIMPLE, Row("", fastlars.LARS, {"lr": 0.1, "dampening": 0.5, "momentum": 0.9})],
    ids=repr,
)
def test_a_state_reset_to_none_starts_anew(row: Row, through_dict: bool) -> None:
    """torch's SGD writes None for a momentum that is not there yet, and people reset it so."""
    case, other = Case(row), Case(row)
    for each in (case, other):
        each.train(0, 1)
    for state in case.optimizer.state.values():
        for name in case.optimizer.rule_of(case.optimizer.param_groups[0]).states:
            state[name] = None
    for state in other.optimizer.state.values():
        state.clear()
    if through_dict:
        case.optimizer.load_state_dict(case.optimizer.state_dict())
    for each in (case, other):
        each.train(2, 3)
    assert_same("parameter", case.params, other.params)


def test_options_that_need_the_last_rate_may_be_switched_on_later() -> None:
    case, other = (Case(Row("", fastlars.LARS, {"lr": 0.1})) for _ in range(2))
    case.train(0, 1)
    other.train(0, 1)
    for group in case.optimizer.param_groups:
        group["momentum_correction"] = True
    case.train(2)  # the rate before this step is not known
    other.train(2)
    assert_same("parameter", case.params, other.params)
    buffer = other.optimizer.state[other.victim]["momentum_buffer"]
    buffer.mul_(2.0)
    for group in (*case.optimizer.param_groups, *other.optimizer.param_groups):
        group["lr"] = 0.2
    case.train(3)
    other.train(3)
    torch.testing.assert_close(case.victim, other.victim, rtol=1e-6, atol=1e-7)


def test_a_pair_that_is_changed_in_place_counts() -> None:
    """Pairs may be lists, as they come out of a file of settings."""
    case, other = (Case(Row("", fastlars.LAMB, {"betas": [0.9, 0.99]})) for _ in range(2))
    for each in (case, other):
        each.train(0)
        for group in each.optimizer.param_groups:
            if each is case:
                group["betas"][0] = 0.5
            else:
                group["betas"] = (0.5, 0.99)
        each.train(1, 2)
    assert_same("parameter", case.params, other.params)


def test_dampening_may_be_switched_on_later() -> None:
    """It holds from the next step on, as in torch.optim.SGD: that is not the first."""
    ours = fastlars.conventions.torch_sgd(lr=0.1, momentum=0.9)
    case = Case(Row("", fastlars.LARS, dict(ours)))
    other = Case(Row("", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}))
    for dampening in (0.0, 0.5, 0.0):
        for each in (case, other):
            for group in each.optimizer.param_groups:
                group["dampening"] = dampening
            each.train(0, 1)
    torch.testing.assert_close(case.params, other.params, rtol=1e-6, atol=1e-7)


def test_a_rate_from_before_a_pause_corrects_nothing() -> None:
    """While the correction is off, the buffer goes on with other rates."""
    case, other = (Case(Row("", fastlars.LARS, {"lr": 0.1})) for _ in range(2))
    for correction, lr in ((True, 0.1), (False, 0.4), (True, 0.4)):
        for each in (case, other):
            for group in each.optimizer.param_groups:
                group |= {"momentum_correction": correction and each is case, "lr": lr}
            each.train(0, 1)
    assert_same("parameter", case.params, other.params)


@each_class
def test_masters_from_before_a_pause_are_forgotten(row: Row) -> None:
    case, other = (Case(row, nn.Parameter(values(4, 6).to(BF16))) for _ in range(2))
    for each in (case, other):
        for masters in (True, False, True):
            if each is other and masters:
                for state in each.optimizer.state.values():
                    state.pop("master", None)  # a new one is made of the weight
            for group in each.optimizer.param_groups:
                group["master_weights"] = masters
            each.train(0, 1, 2)
    assert_same("parameter", case.params, other.params)


@each_class
def test_an_error_in_a_later_group_leaves_the_first_untouched(row: Row) -> None:
    case = Case(row, nn.Parameter(torch.empty(4, 6, device="meta")))
    case.set_gradients()
    case.victim.grad = torch.empty(4, 6, device="meta")
    assert not case.optimizer.state
    case.refuses(TypeError, "meta device")
    assert not case.optimizer.state, "states were made for a step that was not taken"


@each_class
def test_a_back_end_that_is_demanded_but_cannot(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", "cpu")
    case = Case(row, nn.Parameter(values(4, 6).double()))
    case.set_gradients()
    case.refuses(RuntimeError, "FASTLARS_BACKEND=cpu, but .*float64")
    monkeypatch.setenv("FASTLARS_BACKEND", "abacus")
    case = Case(row)
    case.set_gradients()
    case.refuses(
        ValueError,
        "must be one of cpu, cuda, triton, reference, got 'abacus'",
        where="FASTLARS_BACKEND",
    )
