"""What torch's own optimizers take, ours take: numbers, rates, groups, lists changed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fastlars
from optimizers import SIMPLE, Row, assert_same, parameters, set_gradients, train
from optimizers import one_thread as one_thread

SGD = torch.optim.SGD
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


class Sequence:
    """What a configuration library makes of a list."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __getitem__(self, index: int) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)


QUARTER: list[Callable[[float], Any]] = [
    numpy.float64,
    numpy.float32,
    numpy.float16,
    numpy.array,
    Fraction,
    Decimal,
    torch.tensor,
    lambda x: torch.tensor([x]),
    lambda x: numpy.array([x]),
    lambda x: nn.Parameter(torch.tensor(x)),
]
NUMBERS = [
    (row, name)
    for row in SIMPLE
    for name in ("lr", "weight_decay", "eps", "momentum", "trust_coefficient", "max_grad_norm")
    if name in row.make(parameters()).defaults
]


@pytest.mark.parametrize(("row", "name"), NUMBERS, ids=str)
@pytest.mark.parametrize("later", [False, True])
def test_numbers_of_other_libraries(row: Row, name: str, later: bool) -> None:
    """0.25 is the same in all of them, and so are the bits of the step."""
    expected = parameters()
    train(row.make(expected, **{name: 0.25}), expected, range(2))
    for kind in QUARTER:
        params = parameters()
        optimizer = row.make(params, **({} if later else {name: kind(0.25)}))
        if later:
            optimizer.param_groups[0][name] = kind(0.25)
        train(optimizer, params, range(2))
        assert_same(f"parameter of {kind(0.25)!r}", params, expected)


@each_class
@pytest.mark.parametrize("wrong", ["0.25", True, numpy.True_, None, 1j, [0.25, 0.25]], ids=repr)
def test_what_is_no_number(row: Row, wrong: Any) -> None:
    params = parameters()
    optimizer = row.make(params)
    optimizer.param_groups[0]["weight_decay"] = wrong
    with pytest.raises(TypeError, match="group 0: weight_decay must be a number, got"):
        train(optimizer, params, [0])


@pytest.mark.parametrize("name", ["betas", "phi"])
@pytest.mark.parametrize(
    "kind",
    [tuple, list, Sequence, numpy.array, torch.tensor, lambda x: tuple(map(torch.tensor, x))],
    ids=["tuple", "list", "sequence", "array", "tensor", "tuple of tensors"],
)
def test_pairs_are_any_sequence_and_may_change_in_place(name: str, kind: Any) -> None:
    rows = [parameters(), parameters()]
    given = kind([0.5, 0.75]) if kind is not Sequence else Sequence(0.5, 0.75)
    optimizers = [
        fastlars.LAMB(rows[0], **{name: given}),  # type: ignore[arg-type]
        fastlars.LAMB(rows[1], **{name: (0.5, 0.75)}),  # type: ignore[arg-type]
    ]
    for optimizer, params in zip(optimizers, rows, strict=True):
        train(optimizer, params, range(2))
    assert_same("parameter", *rows)
    optimizers[0].param_groups[0][name] = numpy.array([0.75, 0.875])
    optimizers[1].param_groups[0][name] = (0.75, 0.875)
    for optimizer, params in zip(optimizers, rows, strict=True):
        train(optimizer, params, [7])
    for optimizer, value in zip(optimizers, (given, (0.5, 0.75)), strict=True):
        optimizer.param_groups[0][name] = value
    if kind in (list, numpy.array, torch.tensor):
        given[0] = 0.25
    elif not isinstance(given, (tuple, Sequence)) or kind is tuple:
        return
    elif isinstance(given, tuple):
        given[0].fill_(0.25)
    else:
        given._values = (0.25, 0.75)
    optimizers[1].param_groups[0][name] = (0.25, 0.75)
    for optimizer, params in zip(optimizers, rows, strict=True):
        train(optimizer, params, range(2, 4))
    assert_same("parameter", *rows)


@pytest.mark.parametrize("wrong", ["ab", {0.5: 1, 0.75: 2}, {0.5, 0.75}, 0.5, (0.5,), (0.1,) * 3])
def test_what_is_no_pair(wrong: Any) -> None:
    with pytest.raises(TypeError, match="group 0: betas must be a pair of numbers, got"):
        fastlars.LAMB(parameters(), betas=wrong)


@pytest.mark.parametrize("value", [1, 0, numpy.True_, numpy.False_, numpy.int64(1)], ids=repr)
def test_flags_of_configuration_files(value: Any) -> None:
    rows = [parameters(), parameters()]
    for params, nesterov in zip(rows, (value, bool(value)), strict=True):
        train(fastlars.LARS(params, lr=0.5, nesterov=nesterov), params, range(2))
    assert_same("parameter", *rows)


# Rates.

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda o: lr_scheduler.LinearLR(o, 1 / 3, 0.0, total_iters=4),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.0, 0.1, 2, cycle_momentum=False),
    "in turns": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 3)],
        milestones=[3],
    ),
    "averaged": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}


@each_class
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedules_of_torch(row: Row, name: str, tensor: bool) -> None:
    """The same rates as with SGD, to the end, wherever their roundings take them."""
    rates = []
    for kind in (row.make, SGD):
        params = parameters()
        options = {"momentum": 0.9} if kind is SGD else {}
        optimizer = kind(params, lr=torch.tensor(0.1) if tensor else 0.1, **options)
        schedule = SCHEDULES[name](optimizer)
        found = []
        for step in range(8):
            train(optimizer, params, [step])
            schedule.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
        rates.append(found)
    assert rates[0] == rates[1]


@each_class
@pytest.mark.parametrize("lr", [-1.9e-18, numpy.float32(-1e-17), torch.tensor(-1e-12)], ids=str)
def test_a_rate_that_roundings_took_below_zero_is_zero(row: Row, lr: Any) -> None:
    rows = [parameters(), parameters()]
    for params, rate in zip(rows, (lr, 0.0), strict=True):
        optimizer = row.make(params)
        train(optimizer, params, [0])
        optimizer.param_groups[0]["lr"] = rate
        train(optimizer, params, [1])
    assert_same("parameter", *rows)


@each_class
def test_a_negative_rate_is_refused(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params)
    optimizer.param_groups[0]["lr"] = -1e-6
    with pytest.raises(ValueError, match="group 0: lr must be finite and at least 0, got -1e-06"):
        train(optimizer, params, [0])


def test_rates_in_the_groups_alone() -> None:
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = fastlars.LARS([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.25}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    with pytest.raises(TypeError, match="group 2: no lr: give one to the group"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(3))})
    assert len(optimizer.param_groups) == 2
    with pytest.raises(TypeError, match="group 0: no lr"):
        fastlars.LARS([first])


# Groups.


def _trained(kind: Any, change: Callable[[Any, list[nn.Parameter]], None], named: bool) -> Any:
    """Whose weights have moved in the last step, after a change by hand."""
    params = parameters()[:4]
    given = [(f"p{i}", p) for i, p in enumerate(params)] if named else list(params)
    optimizer = kind(given[:3], lr=0.1, momentum=0.9) if kind is SGD else kind(given[:3])
    train(optimizer, params, range(2))
    change(optimizer, params)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, range(2, 4))
    return [not torch.equal(p, was) for p, was in zip(params, before, strict=True)]


def _frozen(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"] = params[1:3]


def _taken_out(optimizer: Any, params: list[nn.Parameter]) -> None:
    del optimizer.param_groups[0]["params"][1]


def _put_in(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].append(params[3])


def _replaced(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"][0] = params[3]


def _turned_round(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def _emptied(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].clear()
    optimizer.add_param_group({"params": params[2:]})


def _unnamed_group(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.add_param_group({"params": params[3:]})


def _named_group(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.add_param_group({"params": [("last", params[3])]})


def _group_removed(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.add_param_group({"params": [params[3]]})
    del optimizer.param_groups[0]


BY_HAND = [_frozen, _taken_out, _put_in, _replaced, _turned_round, _emptied, _unnamed_group]
BY_HAND += [_named_group, _group_removed]


@each_class
@pytest.mark.parametrize("change", BY_HAND)
@pytest.mark.parametrize("named", [False, True])
def test_lists_changed_by_hand(row: Row, change: Any, named: bool) -> None:
    moved = _trained(row.make, change, named)
    # torch refuses groups with names next to groups without.
    theirs = _unnamed_group if change is _named_group else change
    assert moved == _trained(SGD, theirs, named=False)
    assert any(moved)


def test_a_list_changed_by_hand_does_not_lend_names_to_others() -> None:
    params = parameters()
    optimizer = fastlars.LARS([(f"p{i}", p) for i, p in enumerate(params)], lr=0.1)
    del optimizer.param_groups[0]["params"][0]
    params[1].grad = torch.ones(7, dtype=torch.float32).to_sparse()
    with pytest.raises(TypeError, match=r"group 0, parameter 0 has a sparse gradient"):
        optimizer.step()


@each_class
def test_groups_replaced_as_a_whole(row: Row) -> None:
    """By dicts without what a group was given here; as torch's, the step is taken."""
    params = parameters()
    optimizer = row.make(params[:2])
    train(optimizer, params, [0])
    optimizer.param_groups = [{**optimizer.defaults, "params": params}]
    before = [p.detach().clone() for p in params]
    train(optimizer, params, range(1, 3))
    moved = [not torch.equal(p, was) for p, was in zip(params, before, strict=True)]
    assert moved == [p.numel() > 0 for p in params]
    if row.kind is not fastlars.LARS:
        assert optimizer.param_groups[0]["step"] == 3


@each_class
def test_a_parameter_put_in_twice_by_hand_is_refused(row: Row) -> None:
    """In one launch it would take two steps at once, which is none that anybody asked for."""
    params = parameters()
    optimizer = row.make(params[:2])
    train(optimizer, params, [0])
    optimizer.param_groups[0]["params"].append(params[0])
    with pytest.raises(ValueError, match="parameter 2 shares memory with group 0, parameter 0"):
        train(optimizer, params, [1])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_momentum_that_a_schedule_takes_to_zero(compiled: bool) -> None:
    """SGD looks at nesterov=True and a momentum of 0 together only where it is made."""
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours = fastlars.LARS([w], lr=0.5, nesterov=True, adapt=False, buffer="scaled")
    theirs = SGD([v], lr=0.5, momentum=0.9, nesterov=True)
    step = torch.compile(ours.step, backend="aot_eager") if compiled else ours.step
    for momentum in (0.9, 0.0, 0.5, -1e-17):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["momentum"] = momentum
        w.grad, v.grad = torch.ones(3), torch.ones(3)
        step()
        theirs.step()
    torch.testing.assert_close(w, v)
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        fastlars.LARS([w], lr=0.5, nesterov=True, momentum=0.0)


@pytest.mark.parametrize("kind", [numpy.float32, numpy.float64, Fraction])
@pytest.mark.parametrize("name", ["lr", "max_grad_norm", "weight_decay"])
@pytest.mark.filterwarnings("ignore")
def test_numbers_of_other_libraries_in_compiled_steps(kind: Any, name: str) -> None:
    rows = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = parameters()[:2]
        optimizer = fastlars.LAMB(params, **{name: kind(0.25)})
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for number in range(2):
            set_gradients(params, number)
            step()
        rows.append(params)
    assert_same("parameter", *rows)


# Parameters.


@each_class
def test_lazy_modules(row: Row) -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    optimizer = row.make(model.parameters())
    optimizer.step()
    model(torch.ones(3, 4)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


@each_class
@pytest.mark.parametrize(
    "empty",
    [
        lambda: torch.empty(0).as_strided((0, 5), (0, 0)),
        lambda: torch.tensor(numpy.zeros((0, 5), dtype="float32")),
        lambda: torch.empty(3, 0).t(),
        lambda: torch.empty(1, 0).expand(4, 0),
    ],
)
def test_empty_tensors_with_any_strides(row: Row, empty: Any) -> None:
    full, p = nn.Parameter(torch.ones(2)), nn.Parameter(empty())
    optimizer = row.make([p, full])
    for _ in range(2):
        p.grad, full.grad = torch.zeros_like(p), torch.ones(2)
        optimizer.step()
    assert not torch.equal(full, torch.ones(2))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_infinite_phi_of_numpy() -> None:
    fastlars.LAMB(parameters(), phi=(numpy.float32(0), numpy.float32(math.inf)))
