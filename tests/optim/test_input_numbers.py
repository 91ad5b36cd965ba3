"""Hyper-parameters out of range: refused by name, and nothing changed."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastlars
from fastlars.optim.options import from_arguments
from fastlars.rules import LarsRule
from optim.input_cases import Case, each_class, values
from optimizers import SIMPLE, Row, parameters, train
from optimizers import one_thread as one_thread

# Hyper-parameters (rows 8 to 13, 32, 33).

NAN, INF = float("nan"), float("inf")
NUMBERS = [
    ("lr", NAN, ValueError),
    ("lr", INF, ValueError),
    ("lr", -0.1, ValueError),
    ("lr", "0.1", TypeError),
    ("lr", None, TypeError),
    ("lr", True, TypeError),
    ("lr", torch.tensor([0.1, 0.2]), ValueError),
    ("lr", torch.tensor(NAN), ValueError),
    ("weight_decay", NAN, ValueError),
    ("weight_decay", -1e-4, ValueError),
    ("weight_decay", INF, ValueError),
    ("weight_decay", "1", TypeError),
    ("eps", -1.0, ValueError),
    ("max_grad_norm", 0.0, ValueError),
    ("max_grad_norm", NAN, ValueError),
    ("max_grad_norm", "1", TypeError),
    ("state_dtype", torch.float16, ValueError),
    ("state_dtype", "float32", ValueError),
    ("maximize", None, TypeError),
    ("master_weights", None, TypeError),
]
ADAPTING = [
    ("adapt", 2, TypeError),
    ("always_adapt", "yes", TypeError),
    ("trust_clip", "no", TypeError),
    ("ratio_bounds", (1.0, 0.5), ValueError),
    ("ratio_bounds", (-0.1, 1.0), ValueError),
    ("ratio_bounds", (0.0, 0.0), ValueError),
    ("ratio_bounds", (INF, INF), ValueError),
    ("ratio_bounds", (NAN, 1.0), ValueError),
    ("ratio_bounds", 10.0, TypeError),
    ("ratio_bounds", (None, 10.0), TypeError),
]
LARS_NUMBERS = [
    *ADAPTING,
    ("momentum", 1.0, ValueError),
    ("momentum", -0.1, ValueError),
    ("momentum", NAN, ValueError),
    ("dampening", 1.5, ValueError),
    ("trust_coefficient", -1.0, ValueError),
    ("trust_coefficient", NAN, ValueError),
    ("ratio", "sum", ValueError),
    ("buffer", "momentum", ValueError),
    ("nesterov", "yes", TypeError),
]
LAMB_NUMBERS = [
    *ADAPTING,
    ("betas", (1.0, 0.9), ValueError),
    ("betas", (0.9, NAN), ValueError),
    ("betas", 0.9, TypeError),
    ("betas", (0.9, 0.99, 0.999), TypeError),
    ("phi", (2.0, 1.0), ValueError),
    ("phi", (0.0, NAN), ValueError),
    ("phi", (-1.0, 1.0), ValueError),
    ("ratio_eps", -1.0, ValueError),
    ("bias_correction", "maybe", ValueError),
    ("nesterov", "first", ValueError),
    ("nesterov", 2, ValueError),
    ("decay", "l2", ValueError),
    ("grad_averaging", None, TypeError),
]
LANS_NUMBERS = [
    ("eps", -1e-8, ValueError),
    ("betas", (1.0, 0.9), ValueError),
    ("betas", (0.9, NAN), ValueError),
    ("betas", 0.9, TypeError),
    ("phi", (2.0, 1.0), ValueError),
    ("phi", (0.0, NAN), ValueError),
    ("norm_eps", -1.0, ValueError),
    ("norm_eps", INF, ValueError),
    ("normalize_grad", "yes", TypeError),
    ("bias_correction", "rate", TypeError),
    ("decay", "decoupled", ValueError),
    ("grad_averaging", None, TypeError),
    ("adapt", 2, TypeError),
]
RMSPROP_NUMBERS = [
    ("momentum", 1.0, ValueError),
    ("square_decay", 1.0, ValueError),
    ("square_decay", NAN, ValueError),
    ("lr_rmsprop", -1e-4, ValueError),
    ("lr_rmsprop", INF, ValueError),
    ("eps", 0.0, ValueError),
    ("center_steps", -1.0, ValueError),
    ("center_steps", INF, ValueError),
    ("center_steps", None, TypeError),
    ("center_steps", 2.0**24, ValueError),
    ("period_steps", 0.0, ValueError),
    ("period_steps", NAN, ValueError),
    ("period_steps", "5 epochs", TypeError),
    ("period_steps", 2.0**25, ValueError),
    ("transition", "linear", ValueError),
]
HYPER_PARAMETERS = [
    (row, *number)
    for row, own in zip(
        SIMPLE, (LARS_NUMBERS, LAMB_NUMBERS, LANS_NUMBERS, RMSPROP_NUMBERS), strict=True
    )
    for number in NUMBERS + own
]
# How a message may call it, where it is not by its own name.
CALLED = {"betas": "beta", "lr": "lr"}


@pytest.mark.parametrize(("row", "name", "value", "error"), HYPER_PARAMETERS, ids=str)
def test_hyper_parameters_out_of_range(row: Row, name: str, value: Any, error: Any) -> None:
    called = CALLED.get(name, name)
    with pytest.raises(error, match=called):
        row.make(parameters(), **{name: value})

    with pytest.raises(error, match=f"group 1: .*{called}"):
        row.make([{"params": parameters()[:2]}, {"params": parameters()[2:], name: value}])

    # Put there later, as a schedule might.
    case = Case(row)
    case.train(0)
    good = case.optimizer.param_groups[1][name]
    case.optimizer.param_groups[1][name] = value
    case.set_gradients(1)
    case.refuses(error, called, where="group 1")
    with pytest.raises(error, match=f"group 2: .*{called}"):
        case.optimizer.add_param_group({"params": [nn.Parameter(values(2))], name: value})
    assert len(case.optimizer.param_groups) == 2
    case.optimizer.param_groups[1][name] = good
    case.optimizer.step()


def test_options_that_exclude_each_other() -> None:
    for row in SIMPLE:
        with pytest.raises(ValueError, match=r"stochastic_rounding.*masters"):
            row.make(parameters(), master_weights=True, stochastic_rounding=True)
    for options in ({"momentum": 0.0, "nesterov": True}, {"dampening": 0.1, "nesterov": True}):
        with pytest.raises(ValueError, match="nesterov needs a momentum and no dampening"):
            fastlars.LARS(parameters(), lr=0.1, **options)
    with pytest.raises(ValueError, match=r'momentum_correction.*buffer="step"'):
        fastlars.LARS(parameters(), lr=0.1, buffer="scaled", momentum_correction=True)


@each_class
def test_a_tensor_of_two_rates_has_torchs_message(row: Row) -> None:
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        row.make(parameters(), lr=torch.tensor([0.1, 0.2]))


@each_class
@pytest.mark.parametrize("name", ["foreach", "fused", "differentiable"])
def test_options_of_torch_that_have_no_meaning_here(row: Row, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        row.make(parameters(), **{name: True})


@each_class
def test_capturable_says_what_it_needs(row: Row) -> None:
    case = Case(row, capturable=True)
    case.set_gradients()
    case.refuses(RuntimeError, "capturable=True needs", where="group 1, parameter 0")


@each_class
def test_unknown_keys_of_a_group_are_kept(row: Row) -> None:
    optimizer = row.make([{"params": parameters(), "note": "mine"}])
    train(optimizer, optimizer.param_groups[0]["params"], [0])
    assert optimizer.state_dict()["param_groups"][0]["note"] == "mine"


class Word(str, Enum):
    SCALED = "scaled"


@pytest.mark.parametrize("word", [Word.SCALED, np.str_("scaled")])
def test_words_may_be_of_a_subclass_of_str(word: str) -> None:
    rule = LarsRule(buffer=word)  # type: ignore[arg-type]
    assert type(rule.buffer) is str
    assert rule == LarsRule(buffer="scaled")


def test_locals_that_are_no_arguments_are_no_options() -> None:
    # An import hook that checks types puts a local of its own into every function.
    def init(self: Any, params: Any, lr: float = 1.0, *, eps: float = 0.0) -> dict[str, Any]:
        memo = params
        assert memo == []
        return from_arguments()

    assert init(None, []) == {"lr": 1.0, "eps": 0.0}
