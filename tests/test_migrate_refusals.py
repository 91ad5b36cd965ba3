"""States of other libraries that would be no exact continuation: refused, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from fastlars import migrate
from optimizers import Snapshot
from optimizers import one_thread as one_thread


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2, 3), 1.0)), nn.Parameter(torch.full((3,), 2.0))]


def lars(**options: Any) -> fastlars.LARS:
    return fastlars.LARS(parameters(), lr=0.5, **{"momentum": 0.9, "buffer": "scaled", **options})


def lamb(**options: Any) -> fastlars.LAMB:
    return fastlars.LAMB(parameters(), lr=0.5, **options)


def lans(**options: Any) -> fastlars.LANS:
    return fastlars.LANS(parameters(), lr=0.5, **options)


def timm_lars(**states: Any) -> dict[str, Any]:
    group = {"lr": 0.1, "momentum": 0.9, "trust_coeff": 1e-3, "params": [0, 1]}
    buffers = {0: {"momentum_buffer": torch.ones(2, 3)}, 1: {"momentum_buffer": torch.ones(3)}}
    return {"state": {**buffers, **states.get("state", {})}, "param_groups": [group]}


def moments(names: tuple[str, str] = ("exp_avg", "exp_avg_sq"), **more: Any) -> dict[str, Any]:
    shapes = {0: (2, 3), 1: (3,)}
    return {
        "state": {
            i: {names[0]: torch.ones(s), names[1]: torch.full(s, 2.0), **more.get("each", {})}
            for i, s in shapes.items()
        },
        "param_groups": [
            {"betas": (0.9, 0.999), "params": [0, 1], "lr": 0.1, **more.get("group", {})}
        ],
    }


ADAMW = {"group": {"amsgrad": False}}
TIMM_LAMB = {"grad_averaging": True, "step": 3}
GLUONNLP = {"grad_averaging": True, "normalize_grad": True}
POPULAR = {
    "momentum": 0.9,
    "eeta": 1e-3,
    "use_nesterov": False,
    "classic_momentum": False,
    "params": [0, 1],
}
QUANTIZED = {"each": {"absmax1": torch.ones(1), "step": 3}}

REFUSED: list[tuple[Any, Any, Any, dict[str, Any], str]] = [
    (lars, timm_lars(), "timm", {}, r"source must be one of timm_lars, .*, got 'timm'"),
    (lars, moments(), "timm_lamb", {}, "timm_lamb states are for fastlars.LAMB, got LARS"),
    (
        lambda: lars(buffer="step"),
        timm_lars(),
        "timm_lars",
        {},
        "group 0: a timm_lars momentum buffer is that of buffer='scaled', not of buffer='step'",
    ),
    (lars, timm_lars(), "nus_lars", {}, "group 0: a nus_lars .* of buffer='gradient', not of"),
    (lars, timm_lars(), "torchlars", {}, "not of torchlars: group 0 has no .'dampening', 'nester"),
    (lars, [], "timm_lars", {}, r"a timm_lars state is a state_dict\(\), with"),
    (lars, timm_lars(), "timm_lars", {"convert": dict}, "convert is for trees of arrays, and a"),
    (lars, timm_lars(), "timm_lars", {"params": []}, "states of 2 parameters for 0 of them"),
    (
        lars,
        timm_lars(state={1: {"mu": torch.ones(3)}}),
        "timm_lars",
        {},
        "the timm_lars state of parameter 1 has no momentum_buffer",
    ),
    (
        lars,
        timm_lars(state={1: {"momentum_buffer": torch.ones(4)}}),
        "timm_lars",
        {},
        r"group 0, parameter 1: momentum_buffer has shape \(4,\), the parameter \(3,\)",
    ),
    (
        lars,
        timm_lars(),
        "timm_lars",
        {"params": parameters()},
        "params: number 0 has states, but is not of this optimizer",
    ),
    (
        lambda: lamb(betas=(0.8, 0.999)),
        moments(group=TIMM_LAMB),
        "timm_lamb",
        {},
        r"group 0: timm_lamb: these states were made with betas=\(0.9, 0.999\), and mean .*\(0.8,",
    ),
    (
        lambda: lamb(grad_averaging=False),
        moments(group=TIMM_LAMB),
        "timm_lamb",
        {},
        "group 0: timm_lamb: these states were made with grad_averaging=True, and mean .*=False",
    ),
    (
        lamb,
        moments(group={**TIMM_LAMB, "adanorm": True}),
        "pytorch_optimizer_lamb",
        {},
        "group 0: pytorch_optimizer_lamb states with adanorm mean something else",
    ),
    (
        lambda: lars(buffer="step"),
        {"state": {}, "param_groups": [POPULAR]},
        "simclr_lars",
        {},
        "group 0: simclr_lars states with classic_momentum mean something else",
    ),
    (
        lamb,
        moments(each={"max_exp_avg_sq": 1}, group={"eps": 1e-6}),
        "cybertronai_lamb",
        {},
        "has max_exp_avg_sq, which has no counterpart here",
    ),
    (lamb, moments(each={"max_exp_avg_sq": 1}, **ADAMW), "torch_adamw", {}, "has max_exp_avg_sq"),
    (lamb, moments(**ADAMW), "torch_adamw", {}, "group 0, parameter 0: no step"),
    (lamb, moments(("state1", "state2"), **QUANTIZED), "bitsandbytes_lamb", {}, "has absmax1"),
    (
        lamb,
        moments(group={**GLUONNLP, "step": 3}, each={"scaled_grad": torch.zeros(3)}),
        "apex_lamb",
        {},
        "the apex_lamb state of parameter 0 has scaled_grad, which has no counterpart here",
    ),
    (lamb, moments(), "gluonnlp_lans", {}, "gluonnlp_lans states are for fastlars.LANS, got LAMB"),
    (
        lans,
        moments(group=TIMM_LAMB),
        "gluonnlp_lans",
        {},
        "this state_dict is not of gluonnlp_lans: group 0 has no .'normalize_grad'",
    ),
    # The count that later versions of the fork of apex keep, in the state of one parameter alone.
    (
        lans,
        moments(group=GLUONNLP, each={"step": 3}),
        "gluonnlp_lans",
        {},
        "group 0, parameter 0: no step",
    ),
    (
        lambda: lans(grad_averaging=False),
        moments(group={**GLUONNLP, "step": 3}),
        "gluonnlp_lans",
        {},
        "group 0: gluonnlp_lans: these states were made with grad_averaging=True, and mean .*=Fa",
    ),
    (lamb, (), "optax_lamb", {}, "the optax state has 0 parts with mu, nu, count, not 1"),
    (
        lambda: lars(buffer="step"),
        {"w": [1.0]},
        "mlperf_lars",
        {},
        "mlperf_lars: a dict of states needs the names of the parameters",
    ),
    (
        lambda: lars(buffer="step"),
        [torch.ones(2, 3)],
        "mlperf_lars",
        {},
        "mlperf_lars: states must be a dict or a list of 2: pass convert",
    ),
    (
        lambda: lars(buffer="step", momentum_correction=True),
        [torch.ones(2, 3), torch.ones(3)],
        "mlperf_mxnet_lars",
        {},
        "group 0, parameter 0: no last_lr",
    ),
    (
        lambda: lans(normalize_grad=False),
        moments(group={**GLUONNLP, "step": 3}),
        "gluonnlp_lans",
        {},
        "made with normalize_grad=True",
    ),
    (
        lambda: lans(norm_eps=0.0),
        moments(group={**GLUONNLP, "eps": 1e-6, "step": 3}),
        "gluonnlp_lans",
        {},
        "made with norm_eps=1e-06, and mean something else with norm_eps=0.0",
    ),
    *(
        (
            lamb,
            moments(group={**GLUONNLP, "step": 3}, each={"scaled_grad": torch.zeros(3)}),
            source,
            {},
            f"the {source} state of parameter 0 has scaled_grad, which has no counterpart here",
        )
        for source in ("timm_lamb", "pytorch_optimizer_lamb")
    ),
]


@pytest.mark.parametrize(("make", "state", "source", "options", "message"), REFUSED)
def test_refuses_what_is_not_exact(
    make: Any, state: Any, source: str, options: dict[str, Any], message: str
) -> None:
    optimizer = make()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = Snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=message):
        migrate.load(optimizer, state, source, **options)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda a, b: [a, a], "params has a parameter twice"),
        (lambda a, b: [a, nn.Parameter(torch.ones(3))], "params lacks 1 of this optimizer's"),
        (lambda a, b: [{"params": [a, b]}], "params must be tensors, or pairs of name and tensor"),
    ],
)
def test_refuses_orders_that_are_none(choose: Any, message: str) -> None:
    optimizer = lars()
    old = timm_lars()
    del old["state"][1]
    before = Snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=message):
        migrate.load(
            optimizer, old, "timm_lars", params=choose(*optimizer.param_groups[0]["params"])
        )
    before.assert_unchanged()
