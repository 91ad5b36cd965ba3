"""Checkpoints of other optimizers, and such that do not fit: exact, or refused without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn

import fastlars
from fastlars.optim.states import DROPPED_IF_UNUSED
from optim.input_cases import through_file
from optimizers import ROWS, SIMPLE, Row, Snapshot, parameters, set_gradients, train
from optimizers import one_thread as one_thread
from tolerances import assert_same_bits

every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)


# torch's own optimizers.

SGD_ROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (sgd, lars)
    for lars in (
        {"buffer": "gradient"},
        {"buffer": "gradient", "ratio": "combined"},
        {"buffer": "scaled"},
    )
    for sgd in (
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.8, "maximize": True},
        {"momentum": 0.0, "weight_decay": 0.1},
    )
]


@pytest.mark.parametrize(("sgd", "lars"), SGD_ROWS, ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_lars_continues_sgd(sgd: dict[str, Any], lars: dict[str, Any], steps: int) -> None:
    params, others = parameters(), parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, **sgd)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.data)
    other = fastlars.LARS(others, lr=0.1, adapt=False, **lars, **sgd)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for step in range(steps, steps + 3):
        for group in (optimizer.param_groups[0], other.param_groups[0]):
            group["lr"] = 0.1 / (1 + step)
        set_gradients(params, step)
        set_gradients(others, step)
        optimizer.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def test_lars_takes_over_the_very_buffers_of_sgd() -> None:
    params, others = parameters(), parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    other = fastlars.LARS(others, lr=3.0, buffer="gradient", trust_coefficient=0.02)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        buffer = optimizer.state[p]["momentum_buffer"]
        assert_same_bits("buffer", other.state[q]["momentum_buffer"], buffer)
        assert buffer.numel() == 0 or other.state[q]["momentum_buffer"] is not buffer
    # Its own hyper-parameters stay: a rate of SGD's would mean nothing here.
    assert other.param_groups[0]["lr"] == 3.0
    assert other.param_groups[0]["trust_coefficient"] == 0.02


@pytest.mark.parametrize("lars", [{}, {"adapt": False}, {"buffer": "scaled"}], ids=str)
def test_lars_refuses_sgd_where_its_buffer_means_something_else(lars: dict[str, Any]) -> None:
    params = parameters()
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    set_gradients(params, 0)
    sgd.step()
    optimizer = fastlars.LARS(params, lr=1.0, **lars)
    optimizer.step()
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=r"group 0: .*SGD momentum buffer"):
        optimizer.load_state_dict(sgd.state_dict())
    before.assert_unchanged()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_lamb_continues_adam(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    params, others = parameters(), parameters()
    decay = "decoupled" if kind is torch.optim.AdamW else "gradient"
    common = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1}
    optimizer = kind(params, **common, **options)  # type: ignore[call-arg]
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.data)
    other = fastlars.LAMB(others, adapt=False, decay=decay, **common)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for step in range(2, 5):
        set_gradients(params, step)
        set_gradients(others, step)
        optimizer.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=5e-6, atol=5e-7)


def test_lamb_refuses_adam_that_it_cannot_continue() -> None:
    params = parameters()
    set_gradients(params, 0)
    amsgrad = torch.optim.AdamW(params, amsgrad=True)
    plain = torch.optim.AdamW(params)
    amsgrad.step()
    plain.step()
    for adam, options, message in [
        (amsgrad, {}, "group 0, parameter 0: LAMB has no use for its max_exp_avg_sq"),
        (plain, {"grad_averaging": False}, "group 0: .*grad_averaging=True"),
    ]:
        optimizer = fastlars.LAMB(params, **options)
        optimizer.step()
        before = Snapshot(optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(adam.state_dict())
        before.assert_unchanged()


# What does not fit (rows 22 to 25 of the list of hard inputs).

FOREIGN = [
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    torch.optim.AdamW,
    fastlars.LARS,
    fastlars.LAMB,
]
TAKEN = {(fastlars.LAMB, torch.optim.AdamW)}  # the test above
FOREIGN_PAIRS = [
    (row, kind)
    for row in SIMPLE
    for kind in FOREIGN
    if row.kind is not kind and (row.kind, kind) not in TAKEN
]


@pytest.mark.parametrize(
    ("row", "kind"), FOREIGN_PAIRS, ids=lambda x: getattr(x, "__name__", repr(x))
)
@pytest.mark.parametrize("steps", [0, 1])
def test_states_of_another_optimizer(row: Row, kind: Any, steps: int) -> None:
    params, others = parameters(), parameters()
    other = kind(others, lr=0.125)
    if steps:
        set_gradients(others, 0)
        other.step()
    optimizer = row.make(params)
    train(optimizer, params, range(steps))
    before = Snapshot(optimizer)
    message = "SGD momentum buffer" if kind is torch.optim.SGD and row.kind is fastlars.LARS else ""
    with pytest.raises(ValueError, match=message or f"state_dict is not of {row.kind.__name__}"):
        optimizer.load_state_dict(other.state_dict())
    before.assert_unchanged()
    train(optimizer, params, [1])


def _renumbered(state_dict: dict[str, Any], change: str) -> dict[str, Any]:
    groups = state_dict["param_groups"]
    if change == "a group more":
        groups.append({**groups[0], "params": [99]})
    elif change == "a group less":
        groups.pop()
    elif change == "a parameter more":
        groups[1]["params"].append(99)
    elif change == "a parameter less":
        groups[0]["params"].pop()
    return state_dict


@each_class
@pytest.mark.parametrize(
    "change", ["a group more", "a group less", "a parameter more", "a parameter less"]
)
def test_groups_of_other_sizes(row: Row, change: str) -> None:
    params = parameters()
    optimizer = row.make([{"params": params[:2]}, {"params": params[2:]}])
    train(optimizer, params, range(2))
    bad = _renumbered(copy.deepcopy(optimizer.state_dict()), change)
    before = Snapshot(optimizer)
    what = "parameter groups" if "a group" in change else "size of optimizer's group"
    with pytest.raises(ValueError, match=what):
        optimizer.load_state_dict(bad)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("kind", "peer"), [(fastlars.LARS, torch.optim.SGD), (fastlars.LAMB, torch.optim.AdamW)]
)
def test_a_peers_states_in_other_groups(kind: Any, peer: Any) -> None:
    """One group there, biases and norms in one of their own here."""
    model = nn.Linear(3, 2)
    optimizer = kind(fastlars.parameter_groups(model, weight_decay=0.1), lr=0.1)
    with pytest.raises(ValueError, match="has 1 parameter groups, the optimizer 2"):
        optimizer.load_state_dict(peer(model.parameters(), lr=0.1).state_dict())


@every_row
def test_states_of_other_shapes(row: Row) -> None:
    params = parameters(row.dtype)
    optimizer = row.make([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, range(2))
    names = [n for n, x in optimizer.state[params[1]].items() if x.shape == params[1].shape]
    before = Snapshot(optimizer)
    for name in names:
        for wrong in (torch.zeros(6), torch.zeros(8), torch.zeros(7, 1), torch.zeros(())):
            bad = copy.deepcopy(optimizer.state_dict())
            bad["state"][1][name] = wrong
            with pytest.raises(ValueError, match=rf"group 1, parameter 0: {name} has shape"):
                optimizer.load_state_dict(bad)
            before.assert_unchanged()
    assert names or not row.options.get("momentum", 1)


def _not_a_state(value: Tensor) -> list[Any]:
    return [
        [1.0, 2.0],
        value.to_sparse() if value.ndim else "text",
        value.to(torch.complex64),
    ]


@every_row
def test_states_that_are_missing_or_no_tensors(row: Row) -> None:
    params = parameters(row.dtype)
    optimizer = row.make([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, range(2))
    before = Snapshot(optimizer)
    for name, value in optimizer.state[params[1]].items():
        bad = copy.deepcopy(optimizer.state_dict())
        del bad["state"][1][name]
        if bad["state"][1].keys() - DROPPED_IF_UNUSED and name not in DROPPED_IF_UNUSED:
            with pytest.raises(ValueError, match=f"group 1, parameter 0.*{name}"):
                optimizer.load_state_dict(bad)
            before.assert_unchanged()
        # None is a state that was reset; a counter is not reset by itself.
        for wrong in _not_a_state(value) + ([None] if name in ("step", "last_lr") else []):
            bad = copy.deepcopy(optimizer.state_dict())
            bad["state"][1][name] = wrong
            with pytest.raises(ValueError, match=f"group 1, parameter 0.*{name}"):
                optimizer.load_state_dict(bad)
            before.assert_unchanged()


@each_class
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", float("nan")), ("lr", -1.0), ("weight_decay", -1.0), ("max_grad_norm", 0.0)],
)
def test_hyper_parameters_out_of_range(row: Row, name: str, value: float) -> None:
    params = parameters()
    optimizer = row.make([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, range(2))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][1][name] = value
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=f"state_dict, group 1: {name} must"):
        optimizer.load_state_dict(bad)
    before.assert_unchanged()


# States of torch's optimizers under options that change what they hold: taken only as they are.


def _made(kind: Any, **options: Any) -> dict[str, Any]:
    w = nn.Parameter(torch.ones(3))
    optimizer = kind([w], lr=0.1, **options)
    w.grad = torch.ones(3)
    optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    return state


def _loads(optimizer: Any, state: dict[str, Any]) -> bool:
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        return False
    return True


ADAM, ADAMW, SGD, SGDW = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, timm.optim.SGDW
LARS: Callable[..., Any] = lambda p, **more: fastlars.LARS(p, lr=1.0, buffer="gradient", **more)  # noqa: E731


@pytest.mark.parametrize(
    ("kind", "theirs", "make", "ours", "fits"),
    [
        (ADAMW, {}, fastlars.LAMB, {}, True),
        (ADAMW, {"betas": (0.9, 0.95)}, fastlars.LAMB, {}, False),
        (ADAMW, {"betas": (0.9, 0.95)}, fastlars.LAMB, {"betas": [0.9, 0.95]}, True),
        (ADAMW, {"maximize": True}, fastlars.LAMB, {}, False),
        (ADAMW, {"maximize": True}, fastlars.LAMB, {"maximize": True}, True),
        (ADAMW, {}, fastlars.LAMB, {"maximize": True}, False),
        (ADAMW, {"amsgrad": True}, fastlars.LAMB, {}, False),
        (ADAMW, {"weight_decay": 0.1}, fastlars.LAMB, {"decay": "decoupled"}, True),
        (ADAMW, {"weight_decay": 0.1}, fastlars.LAMB, {"decay": "gradient"}, False),
        (ADAMW, {"weight_decay": 0.0}, fastlars.LAMB, {"decay": "gradient"}, True),
        (ADAM, {"weight_decay": 0.1}, fastlars.LAMB, {}, False),
        (ADAM, {"weight_decay": 0.1}, fastlars.LAMB, {"decay": "gradient"}, True),
        (ADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True}, fastlars.LAMB, {}, True),
        (ADAM, {"weight_decay": 0.0}, fastlars.LAMB, {}, True),
        (SGD, {"momentum": 0.9}, LARS, {}, True),
        (SGD, {"momentum": 0.9, "maximize": True}, LARS, {}, False),
        (SGD, {"momentum": 0.9, "maximize": True}, LARS, {"maximize": True}, True),
        (SGD, {"momentum": 0.9, "dampening": 0.5}, LARS, {}, False),
        (SGD, {"momentum": 0.9, "dampening": 0.5}, LARS, {"dampening": 0.5}, True),
        (SGD, {"momentum": 0.9, "nesterov": True}, LARS, {}, True),
        (SGDW, {"momentum": 0.9, "weight_decay": 0.1}, LARS, {}, False),
        (SGDW, {"momentum": 0.9, "weight_decay": 0.0}, LARS, {}, True),
    ],
)
def test_states_are_taken_only_with_their_meaning(
    kind: Any, theirs: dict[str, Any], make: Any, ours: dict[str, Any], fits: bool
) -> None:
    state = _made(kind, **theirs)
    optimizer = make([nn.Parameter(torch.ones(3))], **ours)
    before = copy.deepcopy(optimizer.state_dict())
    assert _loads(optimizer, state) == fits
    if not fits:
        assert repr(optimizer.state_dict()) == repr(before)


def test_a_state_that_does_not_say_whether_it_is_of_adam_or_adamw() -> None:
    """Checkpoints of torch before 2.7 have no decoupled_weight_decay."""
    state = _made(ADAMW, weight_decay=0.1)
    del state["param_groups"][0]["decoupled_weight_decay"]
    optimizer = fastlars.LAMB([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="put decoupled_weight_decay=True"):
        optimizer.load_state_dict(state)
    state["param_groups"][0]["decoupled_weight_decay"] = True
    optimizer.load_state_dict(state)


def test_what_is_not_ours_names_migrate() -> None:
    state = _made(torch.optim.RMSprop)
    for kind in (fastlars.LARS, fastlars.LAMB):
        optimizer = kind([nn.Parameter(torch.ones(3))], lr=0.1)
        with pytest.raises(ValueError, match=r"fastlars\.migrate\.load"):
            optimizer.load_state_dict(state)
