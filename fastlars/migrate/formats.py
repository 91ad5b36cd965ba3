"""How each library stores the states of its optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MOMENTS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_BUFFER = {"momentum_buffer": "momentum_buffer"}


@dataclass(frozen=True)
class Format:
    """How a library stores the states of one of its optimizers.

    Attributes:
        optimizer: the class of fastlars that takes the states, ``"LARS"``, ``"LAMB"`` or
            ``"LANS"``.
        names: the names of states, from the library's to fastlars'.
        buffer: what the library's momentum buffer holds, as one of the values of ``buffer`` of
            ``fastlars.LARS``. Default empty, for a library without such a buffer.
        sign: the sign of that buffer, 1 (default), or -1 where the library adds it to the weights.
        step: where the library counts steps, ``"group"`` for each parameter group, ``"state"`` for
            each parameter. Default empty, no count.
        keys: keys that every parameter group of the library has, by which its ``state_dict`` is
            recognised. Default none.
        demands: values that a group's options must have, where it has them, because others change
            what the states mean. Default none.
        options: options that change what states mean and have another name in the library, from
            fastlars' name to the library's. Default none.
        refused: states that have no counterpart in fastlars. Default none.
        tree: True for a tree of arrays in place of a ``state_dict`` of torch. Default False.
    """

    optimizer: str
    names: Mapping[str, str]
    buffer: str = ""
    sign: int = 1
    step: str = ""
    keys: frozenset[str] = frozenset()
    demands: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    tree: bool = False


def _lars(buffer: str, *keys: str, names: Mapping[str, str] = _BUFFER, **more: Any) -> Format:
    return Format("LARS", names, buffer=buffer, keys=frozenset({"momentum", *keys}), **more)


def _lamb(step: str, *keys: str, names: Mapping[str, str] = _MOMENTS, **more: Any) -> Format:
    # A state with scaled_grad is of LANS, whose moments are of normalized gradients.
    refused = ("scaled_grad", *more.pop("refused", ()))
    keys_of_groups = frozenset({"betas", *keys})
    return Format("LAMB", names, step=step, keys=keys_of_groups, refused=refused, **more)


_SGD = ("dampening", "nesterov")
_MLPERF = Format("LARS", {"momentum": "momentum_buffer"}, buffer="step", sign=-1, tree=True)

#: By the name of the convention; bitsandbytes computes other rules and has no convention.
FORMATS: Mapping[str, Format] = {
    "timm_lars": _lars("scaled", "trust_coeff"),
    "lightly_lars": _lars("scaled", "trust_coefficient", "eps", *_SGD),
    "pytorch_optimizer_lars": _lars("scaled", "trust_coefficient"),
    "apex_larc": _lars("scaled", *_SGD),
    "torchlars": _lars("scaled", *_SGD),
    "simclr_lars": _lars("step", "eeta", "use_nesterov", demands={"classic_momentum": True}),
    "solo_lars": _lars("scaled", "eta", "clip_lars_lr"),
    "vicreg_lars": _lars("scaled", names={"mu": "momentum_buffer"}),
    "barlow_twins_lars": _lars("scaled", names={"mu": "momentum_buffer"}),
    "nus_lars": _lars("gradient"),
    "torch_sgd": _lars("gradient", *_SGD),
    "bitsandbytes_lars": Format(
        "LARS",
        {"state1": "momentum_buffer"},
        buffer="gradient",
        keys=frozenset({"betas"}),
        refused=("absmax1",),
    ),
    "optax_lars": Format("LARS", {"trace": "momentum_buffer"}, buffer="step", sign=-1, tree=True),
    "mlperf_lars": _MLPERF,
    "mlperf_mxnet_lars": _MLPERF,
    "timm_lamb": _lamb("group", "grad_averaging"),
    "apex_lamb": _lamb("group", "grad_averaging"),
    "pytorch_optimizer_lamb": _lamb("group", "grad_averaging", demands={"adanorm": False}),
    "deepspeed_lamb": _lamb("state", "min_coeff", "max_coeff"),
    "cybertronai_lamb": _lamb("state", "eps", refused=("max_exp_avg_sq",)),
    "torch_adamw": _lamb("state", "amsgrad", refused=("max_exp_avg_sq",)),
    "bitsandbytes_lamb": _lamb(
        "state", names={"state1": "exp_avg", "state2": "exp_avg_sq"}, refused=("absmax1",)
    ),
    "optax_lamb": Format("LAMB", {"mu": "exp_avg", "nu": "exp_avg_sq", "count": "step"}, tree=True),
    # Its third state, scaled_grad, is scratch.
    "gluonnlp_lans": Format(
        "LANS",
        _MOMENTS,
        step="group",
        keys=frozenset({"betas", "grad_averaging", "normalize_grad"}),
        options={"norm_eps": "eps"},
    ),
}
