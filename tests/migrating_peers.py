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


def exclude_bias_and_norm(p: Tensor) -> bool:
    return p.ndim == 1


class Vicreg(Formula):
    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        weight_decay_filter: Any,
        lars_adaptation_filter: Any,
    ) -> None:
        defaults = {"momentum": 0.9, "eta": 1e-3, "weight_decay": weight_decay}
        filters = {
            "weight_decay_filter": weight_decay_filter,
            "lars_adaptation_filter": lars_adaptation_filter,
        }
        super().__init__(params, lr, peers.vicreg, **defaults, **filters)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let their import statements find the stand-ins."""
    found = {
        "apex.parallel.LARC": {"LARC": Larc},
        "apex.optimizers": {"FusedLAMB": FusedLamb},
        "torchlars": {"LARS": Torchlars},
        "main_vicreg": {"LARS": Vicreg, "exclude_bias_and_norm": exclude_bias_and_norm},
    }
    for name, members in found.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            module = ModuleType(package)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, module))
        for member, value in members.items():
            setattr(sys.modules[name], member, value)
    # A training script is run as __main__, and so its checkpoints name that.
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "exclude_bias_and_norm", exclude_bias_and_norm, raising=False)
