"""States of torch's optimizers under options that change what they hold: taken only as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

import fastlars
from optimizers import one_thread as one_thread


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
