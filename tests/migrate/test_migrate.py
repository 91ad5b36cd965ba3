"""Runs that another library has begun, continued by fastlars: the same weights, or a refusal.

Every row of peer_rows.py trains half its steps with the peer, or its formula, whose states
are then stored as the peer's published code stores them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from fastlars import conventions, migrate
from migrate import peers
from migrate.peer_rows import ROWS, Row
from migrate.peers import STEPS, Model, distance, learning_rate
from optim.input_cases import through_file
from optimizers import Snapshot
from optimizers import one_thread as one_thread

HALF = STEPS // 2
BACKEND = {torch.float64: "reference", torch.float32: "cpu"}
TOLERANCE = {
    torch.float64: 1e-13,  # operations in another order: roundings of 1e-16 in 20 steps
    torch.float32: 2e-6,  # the same with 6e-8
}
# Formulas keep their states under names of their own.
PUBLISHED = {
    "apex_lamb": {"m": "exp_avg", "v": "exp_avg_sq"},
    "nus_lars": {"buf": "momentum_buffer"},
}
TORCH_LIKE = [row for row in ROWS if not isinstance(row.make, str) and "mlperf" not in str(row)]
MLPERF = [row for row in ROWS if "mlperf" in str(row)]
# Masks nest a state deeper; other options do not show in it, and every row costs seconds of JAX.
MASKED = [row for row in ROWS if {"mask", "weight_decay_mask"} & row.options.keys()]
OPTAX = [next(row for row in ROWS if row.convention == "optax_lamb"), *MASKED]
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def advance(model: nn.Module, optimizer: Any, row: Row, steps: Iterable[int]) -> None:
    for t in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(row.peak, t)
        for p, g in zip(model.parameters(), peers._values()[1][t], strict=True):
            p.grad = g.to(p.dtype, copy=True)
        optimizer.step()


def begun(row: Row, dtype: torch.dtype) -> tuple[Model, Any]:
    """A model that the peer has trained for half of the steps, and the peer."""
    model = Model(dtype)
    assert not isinstance(row.make, str)
    peer = row.make(row.peer_groups(model, 0.0), lr=1.0, **row.options)
    advance(model, peer, row, range(HALF))
    return model, peer


def successor(row: Row, weights: Iterable[torch.Tensor], dtype: torch.dtype) -> tuple[Model, Any]:
    model = Model(dtype)
    for p, w in zip(model.parameters(), weights, strict=True):
        p.data.copy_(w)
    convention = conventions.by_name[row.convention](**row.ours)
    groups = row.groups(model, convention.get("weight_decay", 0.0))
    return model, getattr(fastlars, convention.optimizer)(groups, lr=1.0, **convention)


def published(row: Row, peer: Any) -> dict[str, Any]:
    state_dict = peer.inner.state_dict() if hasattr(peer, "inner") else peer.state_dict()
    renamed = PUBLISHED.get(row.convention, {})
    for index, states in state_dict["state"].items():
        state_dict["state"][index] = {renamed.get(k, k): v for k, v in states.items()}
    return through_file(state_dict)


def in_the_order_of(peer: Any, model: nn.Module, of_peer: nn.Module) -> list[nn.Parameter]:
    names = {p: name for name, p in of_peer.named_parameters()}
    order = [p for group in peer.param_groups for p in group["params"]]
    return [model.get_parameter(names[p]) for p in order]


def assert_needs_and_has_the_states(row: Row, dtype: torch.dtype, both: list[Any]) -> None:
    """``both``: weights with the states loaded, weights without, and the peer's."""
    loaded, fresh, theirs = both
    assert distance(loaded, theirs) <= TOLERANCE[dtype]
    ours = {**conventions.by_name[row.convention], **row.ours}
    if ours.get("momentum", 0.9) != 0.0:
        assert distance(fresh, theirs) > 10 * TOLERANCE[dtype], "the states do not matter here"


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


@each_dtype
@pytest.mark.parametrize("row", TORCH_LIKE, ids=str)
def test_goes_on_with_a_state_dict(
    row: Row, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", BACKEND[dtype])
    of_peer, peer = begun(row, dtype)
    state_dict = published(row, peer)
    results = []
    for fresh in (False, True):
        model, optimizer = successor(row, weights(of_peer), dtype)
        if not fresh:
            params = in_the_order_of(peer, model, of_peer)
            migrate.load(optimizer, state_dict, row.convention, params=params)
        advance(model, optimizer, row, range(HALF, STEPS))
        results.append(weights(model))
    advance(of_peer, peer, row, range(HALF, STEPS))
    assert_needs_and_has_the_states(row, dtype, [*results, weights(of_peer)])


@each_dtype
@pytest.mark.parametrize("row", MLPERF, ids=str)
def test_goes_on_with_momentum_by_name(
    row: Row, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", BACKEND[dtype])
    of_peer, peer = begun(row, dtype)
    named = reversed(list(of_peer.named_parameters()))
    momentum = {f"{name}:0": peer.state[p]["mom"].numpy() for name, p in named}
    results = []
    for fresh in (False, True):
        model, optimizer = successor(row, weights(of_peer), dtype)
        if not fresh:
            migrate.load(
                optimizer,
                momentum,
                conventions.by_name[row.convention],
                params=model.named_parameters(),
                convert=lambda tree: {key.removesuffix(":0"): value for key, value in tree.items()},
                lr=learning_rate(row.peak, HALF - 1),
            )
        advance(model, optimizer, row, range(HALF, STEPS))
        results.append(weights(model))
    advance(of_peer, peer, row, range(HALF, STEPS))
    assert_needs_and_has_the_states(row, dtype, [*results, weights(of_peer)])


def optax_goes_on() -> list[list[Any]]:
    """All rows of optax, with the states loaded, without, and by optax; in a process of its own."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "FASTLARS_BACKEND": "reference"}
    import jax
    import optax

    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_x64", True)
    torch.set_num_threads(1)
    results = []
    for row in OPTAX:
        first, grads = peers._values()
        masks = {key: [w.ndim > 1 for w in first] for key in row.options if "mask" in key}
        rates = jax.numpy.array([learning_rate(row.peak, t) for t in range(STEPS)])
        rule = getattr(optax, str(row.make))(rates.__getitem__, **(row.options | masks))
        params = [jax.numpy.array(w.numpy()) for w in first]
        state, update = rule.init(params), jax.jit(rule.update)
        ours: list[Any] = []
        for t, now in enumerate(grads):
            if t == HALF:
                begun = [torch.tensor(jax.device_get(p)) for p in params]
                ours = [successor(row, begun, torch.float64) for _ in range(2)]
                model, optimizer = ours[0]
                migrate.load(optimizer, state, row.convention, params=model.parameters())
            updates = [jax.numpy.array(g.numpy()) for g in now]
            updates, state = update(updates, state, params)
            params = optax.apply_updates(params, updates)
        for model, optimizer in ours:
            advance(model, optimizer, row, range(HALF, STEPS))
        results.append([[w.numpy() for w in weights(model)] for model, _ in ours])
        results[-1].append([jax.device_get(p) for p in params])
    return results


@cache
def of_optax() -> list[list[Any]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(optax_goes_on).result(timeout=600)


# One worker runs optax, for all of its rows, and not each worker.
@pytest.mark.xdist_group("optax")
@pytest.mark.parametrize("row", OPTAX, ids=str)
def test_goes_on_with_optax(row: Row) -> None:
    each = of_optax()[OPTAX.index(row)]
    both = [[torch.tensor(array) for array in arrays] for arrays in each]
    assert_needs_and_has_the_states(row, torch.float64, both)


@pytest.mark.parametrize("nested", [False, True])
def test_takes_the_moments_of_bitsandbytes(nested: bool) -> None:
    """From release 0.50 on, state_dict() hides tensors from FSDP one dict deeper."""
    p, gone = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    hidden = {"state1": torch.full((3,), 0.25), "state2": torch.full((3,), 0.5)}
    states = {"step": 7, **({"__bnb_optimizer_quant_state__": hidden} if nested else hidden)}
    group = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "params": [0, 1]}
    optimizer = fastlars.LAMB([p])
    old = {"state": {1: states}, "param_groups": [group]}
    migrate.load(optimizer, through_file(old), "bitsandbytes_lamb", params=[gone, p])
    ours = optimizer.state[p]
    assert torch.equal(ours["exp_avg"], hidden["state1"])
    assert torch.equal(ours["exp_avg_sq"], hidden["state2"])
    assert ours["step"] == 7.0


def test_masters_start_from_the_weights() -> None:
    p = nn.Parameter(torch.full((3,), 1.25, dtype=torch.bfloat16))
    group = {"lr": 1.0, "momentum": 0.9, "params": [0]}
    old = {"state": {0: {"mu": torch.full((3,), 0.5)}}, "param_groups": [group]}
    optimizer = fastlars.LARS([p], lr=1.0, master_weights=True, **conventions.vicreg_lars)
    migrate.load(optimizer, old, conventions.vicreg_lars)
    ours = optimizer.state[p]
    assert ours["master"].dtype == ours["momentum_buffer"].dtype == torch.float32
    assert ours["master"].tolist() == [1.25] * 3
    assert ours["momentum_buffer"].tolist() == [0.5] * 3


def test_hyper_parameters_stay() -> None:
    p = nn.Parameter(torch.ones(3))
    group = {"lr": 0.25, "momentum": 0.5, "params": [0]}
    old = {"state": {0: {"mu": torch.ones(3)}}, "param_groups": [group]}
    optimizer = fastlars.LARS([p], lr=2.0, **conventions.vicreg_lars(weight_decay=0.125))
    before = dict(optimizer.param_groups[0])
    migrate.load(optimizer, old, conventions.vicreg_lars)
    after = optimizer.param_groups[0]
    assert {name: after[name] for name in before} == before


def test_every_convention_has_a_format() -> None:
    named = {name for name in migrate.FORMATS if not name.startswith("bitsandbytes")}
    assert named == set(conventions.by_name)
    for name in named:
        assert migrate.FORMATS[name].optimizer == conventions.by_name[name].optimizer


SIMCLR_GROUP = {
    "lr": 1.0,
    "momentum": 0.9,
    "use_nesterov": False,
    "weight_decay": 1e-4,
    "exclude_from_weight_decay": None,
    "exclude_from_layer_adaptation": None,
    "classic_momentum": True,
    "eeta": 0.001,
    "params": [0],
}


@pytest.mark.parametrize("convention", [conventions.simclr_lars, conventions.optax_lars], ids=str)
def test_takes_simclrs_buffers_under_each_name_of_its_rule(
    convention: conventions.Convention,
) -> None:
    w, buffer = nn.Parameter(torch.ones(2, 3)), torch.full((2, 3), 0.25)
    optimizer = fastlars.LARS([w], lr=1.0, **convention(weight_decay=1e-4))
    old = {"state": {0: {"momentum_buffer": buffer}}, "param_groups": [SIMCLR_GROUP]}
    migrate.load(optimizer, old, "simclr_lars")
    assert torch.equal(optimizer.state[w]["momentum_buffer"], buffer)


def test_leaves_the_norms_of_a_plain_lamb_out() -> None:
    w = nn.Parameter(torch.ones(3))
    moments = {"exp_avg": torch.full((3,), 0.25), "exp_avg_sq": torch.full((3,), 0.5)}
    norms = {"weight_norm": torch.ones(()), "adam_norm": torch.ones(()), "trust_ratio": 1}
    group = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0, "params": [0]}
    old = {"state": {0: {"step": 7, **moments, **norms}}, "param_groups": [group]}
    optimizer = fastlars.LAMB([w], **conventions.cybertronai_lamb)
    migrate.load(optimizer, old, conventions.cybertronai_lamb)
    assert optimizer.state[w].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(optimizer.state[w]["exp_avg_sq"], moments["exp_avg_sq"])
    assert optimizer.state[w]["step"] == 7


def test_leaves_the_scratch_of_gluonnlps_lans_out() -> None:
    w = nn.Parameter(torch.ones(3))
    states = {"exp_avg": torch.full((3,), 0.25), "exp_avg_sq": torch.full((3,), 0.5)}
    group = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "step": 7}
    group |= {"bias_correction": True, "grad_averaging": True, "normalize_grad": True}
    scratch = {"scaled_grad": torch.full((3,), 9.0)}
    old = {"state": {0: {**states, **scratch}}, "param_groups": [{**group, "params": [0]}]}
    optimizer = fastlars.LANS([w], **conventions.gluonnlp_lans)
    migrate.load(optimizer, through_file(old), conventions.gluonnlp_lans)
    assert optimizer.state[w].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(optimizer.state[w]["exp_avg"], states["exp_avg"])
    assert torch.equal(optimizer.state[w]["exp_avg_sq"], states["exp_avg_sq"])
    assert optimizer.state[w]["step"] == 7
    assert optimizer.param_groups[0]["step"] == 7


# States of other libraries that would be no exact continuation: refused, and nothing changed.


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
