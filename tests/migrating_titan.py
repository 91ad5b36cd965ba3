"""torchtitan's container of optimizers, release 0.3, as far as docs/migrating.md uses it."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn


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
