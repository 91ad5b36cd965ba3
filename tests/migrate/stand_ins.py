"""Stand-ins for the packages of docs/migrating.md that cannot be installed, under their names.

What they compute stands in peers.py; here are their constructors, and their state_dicts as
their published sources make them.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from migrate import peers
from migrate.peers import AroundSgd, Formula


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
Deepspeed = named(
    peers.deepspeed,
    bias_correction=True,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    max_grad_norm=0.0,
    max_coeff=10.0,
    min_coeff=0.01,
    # An option of the formula alone.
    corrects_rate=False,
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
        "deepspeed.ops.lamb": {"FusedLamb": Deepspeed},
        "main_vicreg": {"LARS": Vicreg, "exclude_bias_and_norm": exclude_bias_and_norm},
        "main": {"LARS": Vicreg, "exclude_bias_and_norm": exclude_bias_and_norm},
        "moco.optimizer": {"LARS": moco},
        "util.lars": {"LARS": moco},
        "lamb_amp_opt.fused_lamb": {"FusedLAMBAMP": FusedLambAmp},
        "schedulers": {"PolyWarmUpScheduler": PolyWarmUpScheduler},
        "torchtitan.components.optimizer": {
            "OptimizersContainer": OptimizersContainer,
            "ParamGroupConfig": ParamGroupConfig,
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


# torchtitan's container of optimizers, release 0.3, as far as docs/migrating.md uses it.


@dataclass(kw_only=True, slots=True)
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class OptimizersContainer:
    """One optimizer for each name; the first pattern that matches a parameter decides."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list[ParamGroupConfig]
        implementation: str = "fused"
        owner: ClassVar[type]

        def build(self, *, model_parts: list[nn.Module]) -> Any:
            return self.owner(self, model_parts)

    def __init_subclass__(cls) -> None:
        cls.Config.owner = cls

    def __init__(self, config: Config, model_parts: list[nn.Module]) -> None:
        kinds = {"fused": "fused", "foreach": "foreach"}
        flags = {flag: config.implementation == name for flag, name in kinds.items()}
        self.optimizers = []
        for model in model_parts:
            groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
            left = dict(model.named_parameters())
            for each in config.param_groups:
                names = [name for name in left if re.search(each.pattern, name)]
                assert names, f"pattern {each.pattern!r} matches no parameter"
                params = {"params": [left.pop(name) for name in names], "param_names": names}
                groups[each.optimizer_name].append(params | flags | each.optimizer_kwargs)
            for name, found in groups.items():
                self.optimizers.append(self._resolve_optimizer_factory(name)(found))

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Flat, by parameter names."""
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            _make_states(optimizer)
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                for index, name in zip(group["params"], group["param_names"], strict=True):
                    for key, value in saved["state"].get(index, {}).items():
                        flat[f"state.{name}.{key}"] = value
                    for key in group.keys() - {"params", "param_names"}:
                        flat[f"param_groups.{name}.{key}"] = group[key]
        return flat

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            _make_states(optimizer)
            saved = optimizer.state_dict()
            state, groups = {}, []
            for group in saved["param_groups"]:
                names = group["param_names"]
                for index, name in zip(group["params"], names, strict=True):
                    keys = saved["state"].get(index, {})
                    state[index] = {key: flat[f"state.{name}.{key}"] for key in keys}
                keys = group.keys() - {"params", "param_names"}
                values = {key: flat[f"param_groups.{names[0]}.{key}"] for key in keys}
                groups.append({"params": group["params"]} | values)
            optimizer.load_state_dict({"state": state, "param_groups": groups})


OptimizersContainer.Config.owner = OptimizersContainer


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """A step of zero gradients at a rate of 0, unless there are states or gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.state or any(p.grad is not None for p in params):
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for p in params:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
