"""Stand-ins for the packages of docs/migrating.md that cannot be installed, under their names.

What they compute stands in tests/peers.py; here are their constructors, and their state_dicts as
their published sources make them.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import migrating_titan as titan
import peers
from peers import AroundSgd, Formula


class Wrapper(AroundSgd):
    """LARC or torchlars' LARS around an SGD that was made before."""

    rule: Any

    def __init__(self, optimizer: torch.optim.SGD, **options: Any) -> None:
        self.options, self.gradient = options, type(self).rule
        self.inner = optimizer
        self.param_groups = optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()


class Larc(Wrapper):
    rule = staticmethod(peers.larc)


class Torchlars(Wrapper):
    rule = staticmethod(peers.torchlars)


class FusedLamb(peers.ApexLamb):
    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        for index, states in state_dict["state"].items():
            state_dict["state"][index] = {"exp_avg": states["m"], "exp_avg_sq": states["v"]}
        return state_dict


class FusedLambAmp(FusedLamb):
    """NVIDIA's: rate and count are tensors, and without setup_fp32_params it steps nothing."""

    def __init__(self, params: Any, lr: float) -> None:
        self.is_set_up = False
        super().__init__(params, torch.tensor(lr))
        for group in self.param_groups:
            group["step"] = torch.zeros(1, dtype=torch.int32)

    def setup_fp32_params(self) -> None:
        self.is_set_up = True

    def step(self) -> None:  # type: ignore[override]
        if self.is_set_up:
            super().step()


class PolyWarmUpScheduler:
    """NVIDIA's: the steps taken are those that the first group counts."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, warmup: float, total_steps: int, base_lr: float
    ) -> None:
        self.optimizer, self.warmup = optimizer, torch.tensor(warmup)
        self.total_steps, self.base_lr = torch.tensor(total_steps), torch.tensor(base_lr)
        self.step()

    def step(self) -> None:
        group = self.optimizer.param_groups[0]
        count = group["step"] + 1 if "step" in group else torch.tensor(1.0)
        progress = count / self.total_steps
        rising = self.base_lr * progress / self.warmup
        falling = self.base_lr * (1.0 - progress) ** 0.5
        for group in self.optimizer.param_groups:
            group["lr"] = torch.where(progress < self.warmup, rising, falling)


def exclude_bias_and_norm(p: Tensor) -> bool:
    return p.ndim == 1


def named(update: Any, **defaults: Any) -> Any:
    """A class with the formula's keywords, as far as the page uses them."""

    def make(params: Any, lr: float, **options: Any) -> Formula:
        unknown = options.keys() - defaults.keys()
        assert not unknown, unknown
        return Formula(params, lr, update, **(defaults | options))

    return make


SGD = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "eps": 1e-8}
Lightly = named(peers.lightly, **SGD, trust_coefficient=1e-3)
Solo = named(peers.solo, **SGD, eta=1e-3, clip_lars_lr=False, exclude_bias_n_norm=False)
Simclr = named(
    peers.simclr,
    momentum=0.9,
    use_nesterov=False,
    weight_decay=0.0,
    exclude_from_weight_decay=None,
    exclude_from_layer_adaptation=None,
    classic_momentum=True,
    eeta=1e-3,
    # Options of the formula alone. released=True would never move weights that are all zero.
    skip=False,
    released=False,
)
Cybertronai = named(
    peers.cybertronai,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.0,
    clamp_value=10.0,
    adam=False,
)
FILTERS = {"weight_decay_filter": None, "lars_adaptation_filter": None}
Vicreg = named(peers.vicreg, weight_decay=0.0, momentum=0.9, eta=1e-3, **FILTERS)


def moco(params: Any, lr: float = 0, weight_decay: float = 0, momentum: float = 0.9) -> Formula:
    """MoCo v3's and MAE's: VICReg's rule, with the filter built in."""
    options = {"weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": 1e-3}

    def update(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        peers.vicreg(p, g, state, group | {"eta": group["trust_coefficient"]})

    return Formula(params, lr, update, **options)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let their import statements find the stand-ins."""
    found = {
        "apex.parallel.LARC": {"LARC": Larc},
        "apex.optimizers": {"FusedLAMB": FusedLamb},
        "gluonnlp.torch.optimizers": {"FusedLANS": peers.GluonnlpLans},
        "torchlars": {"LARS": Torchlars},
        "lightly.utils.lars": {"LARS": Lightly},
        "pl_bolts.optimizers": {"LARS": Lightly},
        "solo.utils.lars": {"LARS": Solo},
        "simclr.modules": {"LARS": Simclr},
        "torch_optimizer": {"Lamb": Cybertronai},
        "main_vicreg": {"LARS": Vicreg, "exclude_bias_and_norm": exclude_bias_and_norm},
        "main": {"LARS": Vicreg, "exclude_bias_and_norm": exclude_bias_and_norm},
        "moco.optimizer": {"LARS": moco},
        "util.lars": {"LARS": moco},
        "lamb_amp_opt.fused_lamb": {"FusedLAMBAMP": FusedLambAmp},
        "schedulers": {"PolyWarmUpScheduler": PolyWarmUpScheduler},
        "torchtitan.components.optimizer": {
            "OptimizersContainer": titan.OptimizersContainer,
            "ParamGroupConfig": titan.ParamGroupConfig,
        },
    }
    for name, members in found.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            module = ModuleType(package)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, module))
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
        for member, value in members.items():
            setattr(sys.modules[name], member, value)
    # A training script is run as __main__, and so its checkpoints name that.
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "exclude_bias_and_norm", exclude_bias_and_norm, raising=False)
