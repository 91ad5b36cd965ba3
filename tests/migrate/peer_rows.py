"""Hyper-parameters with which test_conventions.py runs every peer, and fastlars next to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_optimizer
import timm.optim
import torch
from torch import Tensor, nn

import fastlars
from migrate import peers
from migrate.peers import AroundSgd, Formula, Groups

Options = dict[str, Any]
Grouping = Callable[[nn.Module, float], Groups]


def everything(model: nn.Module, _: float) -> Groups:
    return [{"params": list(model.parameters())}]


def split(model: nn.Module, _: float, flag: str | None = None) -> Groups:
    """Matrices, and the rest without decay. ``flag`` is the peer's own for the former."""
    kinds = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups: Groups = [{"params": params} for params in kinds]
    groups[1]["weight_decay"] = 0.0
    if flag is not None:
        groups[0][flag], groups[1][flag] = True, False
    return groups


def mlperf_skips(name: str, _: Any) -> bool:
    return any(part in name for part in ("batch_normalization", "bn", "bias"))


def mlperf_groups(model: nn.Module, _: float) -> Groups:
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if mlperf_skips(name, p) == skip], "skip": skip}
        for skip in (False, True)
    ]


by_dimension = fastlars.parameter_groups
by_name = partial(fastlars.parameter_groups, exclude=mlperf_skips)
but_numbers = partial(fastlars.parameter_groups, exclude=lambda _, p: p.ndim == 1)
decay_alone = partial(fastlars.parameter_groups, adapt_excluded=True)


@dataclass(frozen=True, eq=False)
class Row:
    """A convention with one set of hyper-parameters, in the peer's words and in fastlars'."""

    convention: str
    make: Callable[..., Any] | str  # a string names a function of optax
    peak: float
    options: Options
    ours: Options
    groups: Grouping
    peer_groups: Grouping

    def __str__(self) -> str:
        keywords = getattr(self.make, "keywords", {})
        kind = {True: "foreach", False: "loop"}.get(keywords.get("foreach"))
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return "-".join(filter(None, (self.convention, kind, options or "defaults")))


def rows(
    convention: str,
    make: Callable[..., Any] | str,
    peak: float,
    *options: Options | tuple[Options, Options],
    groups: Grouping = everything,
    peer_groups: Grouping | None = None,
) -> list[Row]:
    """A row for each of ``options``: one dict for both, or the peer's and fastlars'."""
    pairs = [o if isinstance(o, tuple) else (o, o) for o in options]
    return [Row(convention, make, peak, *pair, groups, peer_groups or groups) for pair in pairs]


M = {"momentum": 0.9}
D = {"weight_decay": 0.01}
N = {"nesterov": True}
BOTH = ({"foreach": True}, {"foreach": False})

TIMM_LARS: list[Any] = [
    {},
    M | D,
    M | D | N,
    M | D | {"dampening": 0.3},
    M | {"always_adapt": True},
    M | D | {"eps": 0.1},
    # The ratio lies on both sides of the learning rate.
    (
        M | D | {"trust_clip": True, "trust_coeff": 5.0},
        M | D | {"trust_clip": True, "trust_coefficient": 5.0},
    ),
]
TIMM_LAMB: list[Any] = [
    {},
    {"weight_decay": 0.0},
    {"weight_decay": 0.0, "always_adapt": True},
    # The norm of all gradients lies on both sides of 8.
    {"max_grad_norm": 8.0, "trust_clip": True},
    {"max_grad_norm": None, "bias_correction": False, "grad_averaging": False},
    {"betas": (0.8, 0.9), "eps": 1e-3},
    ({"decoupled_decay": True}, {"decay": "decoupled"}),
]
KOZISTR_LARS: list[Any] = [
    {},
    D,
    D | N,
    {"momentum": 0.0, "trust_coefficient": 0.01},
    D | {"maximize": True},
]
KOZISTR_LAMB: list[Any] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "grad_averaging": False, "betas": (0.8, 0.9)},
    ({"weight_decay": 0.1, "weight_decouple": False}, {"weight_decay": 0.1, "decay": "update"}),
    ({"adam": True}, {"adapt": False}),
    ({"adam_debias": True}, {"bias_correction": False}),
    ({"eps": 1e-3}, {"eps": 1e-3, "ratio_eps": 1e-3}),
    {"maximize": True},
]
SGD: list[Any] = [
    {},
    M,
    M | D,
    M | D | N,
    M | D | {"dampening": 0.3},
    M | D | {"maximize": True},
    # Without a ratio the two buffers with the rate outside are one.
    (M | D | N, M | D | N | {"buffer": "gradient"}),
    (M | {"dampening": 0.3}, M | {"dampening": 0.3, "buffer": "gradient"}),
]
ADAMW: list[Any] = [
    {},
    {"weight_decay": 0.0, "betas": (0.8, 0.9)},
    {"weight_decay": 0.1, "eps": 1e-3},
    {"maximize": True},
]
APEX_LAMB: list[Any] = [
    {},
    ({"use_nvlamb": True, "weight_decay": 0.0}, {"always_adapt": True, "weight_decay": 0.0}),
    ({"adam_w_mode": False, "max_grad_norm": 8.0}, {"decay": "gradient", "max_grad_norm": 8.0}),
    {"bias_correction": False, "grad_averaging": False},
    {"betas": (0.8, 0.9), "eps": 1e-3},
]
GLUONNLP_LANS: list[Any] = [
    {},
    {"weight_decay": 0.0},
    {"weight_decay": 0.1, "bias_correction": False},
    {"weight_decay": 0.1, "grad_averaging": False, "betas": (0.8, 0.9)},
    {"weight_decay": 0.1, "normalize_grad": False},
    ({"weight_decay": 0.1, "adam_w_mode": False}, {"weight_decay": 0.1, "decay": "gradient"}),
    ({"eps": 1e-2}, {"eps": 1e-2, "norm_eps": 1e-2}),
]
# With a peak of 1: above it, see test_larc_does_not_clip_zeros.
LARC: list[Any] = [
    {},
    M | D,
    M | D | N,
    M | D | {"trust_coefficient": 5.0},
    (M | D | {"clip": False}, M | D | {"trust_clip": False}),
    M | D | {"eps": 0.1},
]
SOLO: list[Any] = [
    {},
    M | D,
    M | D | N,
    M | D | {"dampening": 0.3},
    (
        M | D | {"eta": 5.0, "eps": 0.1, "clip_lars_lr": True},
        M | D | {"trust_coefficient": 5.0, "eps": 0.1, "trust_clip": True},
    ),
]
SIMCLR: list[Any] = [
    {},
    D,
    (D | {"use_nesterov": True}, D | N),
    (D | {"eeta": 0.01}, D | {"trust_coefficient": 0.01}),
]
VICREG_OPTIONS = {"momentum": 0.9, "weight_decay": 0.0, "eta": 1e-3}
MLPERF_OPTIONS = {
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "eeta": 1e-3,
    "epsilon": 0.0,
    "nesterov": False,
}
SGD_OPTIONS = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
LIGHTLY_OPTIONS = SGD_OPTIONS | {"trust_coefficient": 1e-3, "eps": 1e-8}
SOLO_OPTIONS = SGD_OPTIONS | {
    "eta": 1e-3,
    "eps": 1e-8,
    "clip_lars_lr": False,
    "exclude_bias_n_norm": False,
}
SIMCLR_OPTIONS = {
    "momentum": 0.9,
    "use_nesterov": False,
    "weight_decay": 0.0,
    "classic_momentum": True,
    "eeta": 1e-3,
    "skip": False,
    "released": False,
}
CYBERTRONAI_OPTIONS = {
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "clamp_value": 10.0,
    "adam": False,
}
DEEPSPEED_OPTIONS = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "bias_correction": True,
    "max_coeff": 10.0,
    "min_coeff": 0.01,
    "corrects_rate": False,
}
NUS_OPTIONS = {"momentum": 0.0, "weight_decay": 0.0, "eeta": 1e-3}


def mlperf(correct: bool) -> Callable[..., Any]:
    return partial(Formula, update=peers.mlperf, correct=correct, **MLPERF_OPTIONS)


def formula(update: Callable[..., None], defaults: Options) -> Callable[..., Any]:
    return lambda params, lr, **options: Formula(params, lr, update, **(defaults | options))


def around_sgd(gradient: Callable[..., Tensor]) -> Callable[..., Any]:
    return partial(AroundSgd, gradient=gradient)


MLPERF_ROWS: list[Any] = [
    {},
    {"weight_decay": 0.0},
    D,
    D | N,
    (D | {"epsilon": 1e-7, "eeta": 0.01}, D | {"eps": 1e-7, "trust_coefficient": 0.01}),
]
MLPERF_GROUPS: dict[str, Any] = {"groups": by_name, "peer_groups": mlperf_groups}
MASKS = {"weight_decay_mask": True, "trust_ratio_mask": True}

ROWS = [
    *(
        row
        for each in BOTH
        for row in (
            *rows("timm_lars", partial(timm.optim.Lars, **each), 5.0, *TIMM_LARS, groups=split),
            *rows("timm_lamb", partial(timm.optim.Lamb, **each), 0.05, *TIMM_LAMB, groups=split),
            *rows(
                "pytorch_optimizer_lars",
                partial(pytorch_optimizer.LARS, **each),
                5.0,
                *KOZISTR_LARS,
                groups=by_dimension,
                peer_groups=everything,
            ),
            *rows(
                "pytorch_optimizer_lamb",
                partial(pytorch_optimizer.Lamb, **each),
                0.05,
                *KOZISTR_LAMB,
            ),
        )
    ),
    *rows("timm_lars", timm.optim.Lars, 5.0, M | D, groups=by_dimension, peer_groups=split),
    *rows("timm_lamb", timm.optim.Lamb, 0.05, {}, groups=by_dimension, peer_groups=split),
    *rows("torch_sgd", torch.optim.SGD, 0.1, *SGD, groups=split),
    *rows("torch_adamw", torch.optim.AdamW, 0.05, *ADAMW, groups=split),
    *rows("optax_lars", "lars", 5.0, {}, D, D | N, {"momentum": 0.0}),
    *rows("optax_lars", "lars", 5.0, D | {"eps": 0.1, "trust_coefficient": 0.01}),
    *rows("optax_lars", "lars", 5.0, (D | MASKS, D), groups=by_dimension, peer_groups=everything),
    *rows("optax_lamb", "lamb", 0.05, {}, {"weight_decay": 0.1}),
    *rows("optax_lamb", "lamb", 0.05, ({"b1": 0.8, "b2": 0.9}, {"betas": (0.8, 0.9)})),
    *rows("optax_lamb", "lamb", 0.05, {"eps": 1e-3, "weight_decay": 0.1}),
    *rows(
        "optax_lamb",
        "lamb",
        0.05,
        ({"weight_decay": 0.1, "mask": True}, {"weight_decay": 0.1}),
        groups=decay_alone,
        peer_groups=everything,
    ),
    # Formulas from here on.
    *rows("apex_larc", around_sgd(peers.larc), 1.0, *LARC, groups=split),
    *rows("torchlars", around_sgd(peers.torchlars), 5.0, {}, M | D, M | D | N, groups=split),
    *rows("torchlars", around_sgd(peers.torchlars), 5.0, M | D | {"eps": 0.1}),
    *rows(
        "lightly_lars",
        formula(peers.lightly, LIGHTLY_OPTIONS),
        5.0,
        {},
        M | D,
        M | D | N,
        M | D | {"dampening": 0.3},
        M | D | {"eps": 0.1, "trust_coefficient": 0.01},
        groups=split,
    ),
    *rows("solo_lars", formula(peers.solo, SOLO_OPTIONS), 1.0, *SOLO, groups=split),
    *rows(
        "solo_lars",
        formula(peers.solo, SOLO_OPTIONS),
        1.0,
        (M | D | {"exclude_bias_n_norm": True}, M | D),
        groups=but_numbers,
        peer_groups=everything,
    ),
    *rows("simclr_lars", formula(peers.simclr, SIMCLR_OPTIONS), 5.0, *SIMCLR),
    *rows("simclr_lars", formula(peers.simclr, SIMCLR_OPTIONS), 5.0, D, **MLPERF_GROUPS),
    *rows(
        "cybertronai_lamb",
        formula(peers.cybertronai, CYBERTRONAI_OPTIONS),
        0.05,
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3},
        ({"adam": True}, {"adapt": False}),
        ({"clamp_value": 5.0}, {"phi": (0.0, 5.0)}),
    ),
    *rows(
        "deepspeed_lamb",
        formula(peers.deepspeed, DEEPSPEED_OPTIONS),
        0.05,
        {},
        {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3},
        {"weight_decay": 0.1, "bias_correction": False},
        # The ratios lie on both sides of each.
        ({"min_coeff": 0.4, "max_coeff": 1.0}, {"ratio_bounds": (0.4, 1.0)}),
    ),
    *rows("apex_lamb", peers.ApexLamb, 0.05, *APEX_LAMB, groups=split),
    *rows("gluonnlp_lans", peers.GluonnlpLans, 0.05, *GLUONNLP_LANS, groups=split),
    *rows("mlperf_lars", mlperf(correct=False), 5.0, *MLPERF_ROWS, **MLPERF_GROUPS),
    *rows("mlperf_mxnet_lars", mlperf(correct=True), 5.0, *MLPERF_ROWS, **MLPERF_GROUPS),
    *(
        row
        for name in ("vicreg_lars", "barlow_twins_lars")
        for row in rows(
            name,
            formula(peers.vicreg, VICREG_OPTIONS),
            5.0,
            {},
            D,
            (D | {"eta": 0.01}, D | {"trust_coefficient": 0.01}),
            groups=but_numbers,
            peer_groups=everything,
        )
    ),
    *rows(
        "nus_lars",
        formula(peers.nus, NUS_OPTIONS),
        5.0,
        {},
        M,
        M | D,
        groups=by_dimension,
        peer_groups=partial(split, flag="lars"),
    ),
]
