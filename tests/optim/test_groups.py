"""parameter_groups: biases and norms out of weight decay and adaptation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import fastlars


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=True)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


KEPT = ["conv.weight", "first.weight"]
EXCLUDED = ["scale", "conv.bias", "norm.weight", "norm.bias", "tied.bias"]


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def test_biases_and_norms_are_neither_decayed_nor_adapted() -> None:
    kept, excluded = fastlars.parameter_groups(Model(), weight_decay=0.1)
    assert names(kept) == KEPT
    assert sorted(names(excluded)) == sorted(EXCLUDED)
    # Whether to adapt is the optimizer's own option.
    assert (kept["weight_decay"], "adapt" in kept) == (0.1, False)
    assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)


def test_parameters_are_the_models_own_and_shared_ones_appear_once() -> None:
    model = Model()
    groups = fastlars.parameter_groups(model, weight_decay=0.1)
    found = [p for group in groups for _, p in group["params"]]
    trainable = {p for p in model.parameters() if p.requires_grad}
    assert len(found) == len(trainable)
    assert set(found) == trainable


def test_a_rule_of_ones_own() -> None:
    kept, excluded = fastlars.parameter_groups(
        Model(),
        weight_decay=0.1,
        exclude=lambda name, p: name.startswith("conv") or p.ndim == 0,
        adapt_excluded=True,
    )
    assert sorted(names(excluded)) == ["conv.bias", "conv.weight", "scale"]
    assert sorted(names(kept)) == ["first.weight", "norm.bias", "norm.weight", "tied.bias"]
    assert (excluded["weight_decay"], "adapt" in excluded) == (0.0, False)


class Norms(nn.Module):
    """A normalisation layer of somebody's own, and one that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Module()
        self.own.gain = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.group = nn.GroupNorm(1, 3)
        # No such layer, for all its name: its weight lies in modules below it.
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))


NORMS = {"own.gain", "group.weight", "group.bias"}
BIASES = {"linear.bias", "attention.in_proj_bias", "attention.out_proj.bias", "normed.bias"}
LARGE = {"linear.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
LARGE |= {f"normed.parametrizations.weight.original{i}" for i in range(2)}
SMALL = {"none": set(), "norms": NORMS, "norms+biases": NORMS | BIASES}


@pytest.mark.parametrize("no_ratio", SMALL)
@pytest.mark.parametrize("no_decay", SMALL)
def test_who_is_decayed_and_who_is_adapted(no_decay: Any, no_ratio: Any) -> None:
    groups = fastlars.parameter_groups(Norms(), 0.1, no_decay=no_decay, no_ratio=no_ratio)
    undecayed = [name for group in groups if group["weight_decay"] == 0 for name in names(group)]
    unadapted = [name for group in groups if group.get("adapt") is False for name in names(group)]
    every = [name for group in groups for name in names(group)]
    assert sorted(undecayed) == sorted(SMALL[no_decay])
    assert sorted(unadapted) == sorted(SMALL[no_ratio])
    assert sorted(every) == sorted(NORMS | BIASES | LARGE)
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize(
    ("wrap", "prefix"), [(nn.DataParallel, "module."), (torch.compile, "_orig_mod.")]
)
def test_wrapped_models(wrap: Any, prefix: str) -> None:
    wrapped = wrap(Norms())
    kept, excluded = fastlars.parameter_groups(wrapped, 0.1, no_decay="norms", no_ratio="norms")
    assert set(names(excluded)) == {prefix + name for name in NORMS}
    assert set(names(kept)) == {prefix + name for name in BIASES | LARGE}


def test_adapt_excluded_is_no_ratio_none() -> None:
    old = fastlars.parameter_groups(Norms(), 0.1, adapt_excluded=True)
    new = fastlars.parameter_groups(Norms(), 0.1, no_ratio="none")
    assert [(names(group), group["weight_decay"], "adapt" in group) for group in old] == [
        (names(group), group["weight_decay"], "adapt" in group) for group in new
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"no_decay": "biases"},
            'no_decay must be "none", "norms", "norms+biases" or a callable, got \'biases\'',
        ),
        ({"no_ratio": "biases", "adapt_excluded": True}, "no_ratio must be"),
        ({"no_ratio": ""}, "no_ratio must be"),
        ({"no_ratio": "none", "exclude": lambda *_: True}, "exclude takes the place"),
        ({"no_decay": lambda *_: True, "exclude": lambda *_: True}, "exclude takes the place"),
    ],
)
def test_choices_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fastlars.parameter_groups(Norms(), 0.1, **arguments)


def test_groups_without_parameters_are_left_out() -> None:
    (only,) = fastlars.parameter_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)
    assert only["weight_decay"] == 0.1
    (only,) = fastlars.parameter_groups(nn.LayerNorm(2), weight_decay=0.1)
    assert only["weight_decay"] == 0.0


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)])
def test_a_model_without_trainable_parameters(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no trainable parameters"):
        fastlars.parameter_groups(model, weight_decay=0.1)


@pytest.mark.parametrize("kind", [fastlars.LARS, fastlars.LAMB])
def test_optimizers_take_the_groups_as_they_are(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = kind(fastlars.parameter_groups(model, weight_decay=0.1), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    ratios = optimizer.trust_ratios()
    adapted = [p for p in model.parameters() if ratios[p] != 1.0]
    assert adapted == [model[0].weight]
    assert all(not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_a_negative_weight_decay_is_refused_by_the_optimizer() -> None:
    groups = fastlars.parameter_groups(nn.Linear(2, 2), weight_decay=-1.0)
    with pytest.raises(ValueError, match="group 0: weight_decay must"):
        fastlars.LARS(groups, lr=0.1)
