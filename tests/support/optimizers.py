"""The table of optimizers that every contract test runs through, and what those tests share.

A new optimizer is one more row, "of the paper"; its other options are rows as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlars
from fastlars.optim.base import FusedOptimizer
from tolerances import assert_same_bits

BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """For the module that imports it: barriers of small problems wait long on a busy machine."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Row:
    """An optimizer under its options.

    Attributes:
        kind: the class.
        options: keyword arguments, the learning rate among them.
        dtype: of the parameters it is tried with.
    """

    name: str
    kind: type[FusedOptimizer]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def adapts(self) -> bool:
        """Whether the class takes trust ratios, and has options for them."""
        return self.kind.rule.sums > 0

    @property
    def needed(self) -> dict[str, Any]:
        """The options for which the class has no default."""
        given = signature(self.kind).parameters
        return {k: v for k, v in self.options.items() if given[k].default is Parameter.empty}

    def make(self, params: Iterable[Any], **overrides: Any) -> FusedOptimizer:
        return self.kind(params, **{**self.options, **overrides})

    def __repr__(self) -> str:
        return self.name


def _lars(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Row:
    usual = {"lr": 0.5, "weight_decay": 0.01, "trust_coefficient": 0.1}
    return Row(f"LARS {name}", fastlars.LARS, {**usual, **options}, dtype)


def _lamb(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Row:
    usual = {"lr": 0.05, "weight_decay": 0.01}
    return Row(f"LAMB {name}", fastlars.LAMB, {**usual, **options}, dtype)


def _lans(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Row:
    usual = {"lr": 0.05, "weight_decay": 0.01}
    return Row(f"LANS {name}", fastlars.LANS, {**usual, **options}, dtype)


def _rmsprop(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Row:
    # The tests take a few steps: some before the center, some after it, some warmed up.
    usual = {"lr": 0.05, "weight_decay": 0.01, "center_steps": 1.5, "period_steps": 3.0}
    return Row(f"RMSprop warm-up {name}", fastlars.RMSpropWarmup, {**usual, **options}, dtype)


ROWS = (
    _lars("of the paper"),
    _lars("scaled, nesterov", buffer="scaled", nesterov=True),
    _lars("gradient, combined", buffer="gradient", ratio="combined"),
    _lars("momentum correction", momentum_correction=True),
    _lars("dampening", dampening=0.3),
    _lars("without momentum", momentum=0.0),
    _lars("ratio bounds", ratio_bounds=(0.1, 0.2)),
    _lars("without adaptation", adapt=False),
    _lars("bfloat16 state", state_dtype=BF16),
    _lars("masters", dtype=BF16, master_weights=True),
    _lars(
        "float16 masters, correction", torch.float16, master_weights=True, momentum_correction=True
    ),
    _lars("float64", dtype=F64),
    _lamb("of the paper"),
    _lamb("rate, decoupled", bias_correction="rate", decay="decoupled"),
    _lamb("trust clip, phi", trust_clip=True, phi=(0.1, 10.0)),
    _lamb("without adaptation", adapt=False),
    _lamb("nesterov, ratio bounds", nesterov=True, ratio_bounds=(0.01, 10.0)),
    _lamb("nesterov both, bfloat16 state", nesterov="both", state_dtype=BF16),
    _lamb("bfloat16 state", state_dtype=BF16),
    _lamb("masters, bfloat16 state", dtype=BF16, master_weights=True, state_dtype=BF16),
    _lamb("float64", dtype=F64),
    _lans("of the paper"),
    _lans("norm_eps, decay gradient", norm_eps=1e-3, decay="gradient"),
    _lans("not normalized, phi", normalize_grad=False, phi=(0.1, 10.0)),
    _lans("without adaptation", adapt=False),
    _lans("bfloat16 state", state_dtype=BF16),
    _lans("masters, bfloat16 state", dtype=BF16, master_weights=True, state_dtype=BF16),
    _lans("float64", dtype=F64),
    _rmsprop("of the paper"),
    _rmsprop("printed", transition="printed"),
    _rmsprop("masters, bfloat16 state", dtype=BF16, master_weights=True, state_dtype=BF16),
    _rmsprop("float64", dtype=F64),
)
# One row of each class, for what does not depend on options.
SIMPLE = tuple(row for row in ROWS if row.name.endswith("of the paper"))
OPTIONS = {row.kind.__name__: row.options for row in SIMPLE}

SHAPES = ((6, 5), (7,), (), (4, 3, 2, 2), (0,))


def parameters(dtype: torch.dtype = torch.float32, seed: int = 1) -> list[nn.Parameter]:
    """Parameters of several shapes; the fourth is channels_last."""
    generator = torch.Generator().manual_seed(seed)
    values = [0.5 * torch.randn(shape, generator=generator) for shape in SHAPES]
    values[3] = values[3].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(value.to(dtype)) for value in values]


def set_gradients(params: Iterable[Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients laid out like the weights, that depend on the step and the place in the list."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = torch.empty_like(p, requires_grad=False)
        p.grad = grad.copy_(0.1 * scale * torch.randn(p.shape, generator=generator))


def train(
    optimizer: FusedOptimizer,
    params: list[Any],
    steps: Iterable[int],
    before: Callable[[int], None] = lambda step: None,
) -> None:
    """Take the numbered steps; ``before`` runs ahead of each."""
    for step in steps:
        set_gradients(params, step)
        before(step)
        optimizer.step()


def assert_same(what: str, actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Every tensor of one list has the bits of its counterpart."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(f"{what} {i}", a, e)


class Snapshot:
    """Everything that an optimizer could change, as it was."""

    def __init__(self, optimizer: torch.optim.Optimizer, *others: Tensor) -> None:
        self.optimizer, self.others = optimizer, others
        self.taken = self._take()

    def _take(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for g, group in enumerate(self.optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                where = f"group {g}, parameter {i}"
                found[where] = _copy(p)
                found[f"{where}, gradient"] = _copy(p.grad)
                for name, value in self.optimizer.state.get(p, {}).items():
                    found[f"{where}, {name}"] = _copy(value)
            for name, value in group.items():
                if name != "params":
                    found[f"group {g}, {name}"] = _copy(value)
        for i, tensor in enumerate(self.others):
            found[f"tensor {i}"] = _copy(tensor)
        return found

    def assert_unchanged(self) -> None:
        now = self._take()
        assert now.keys() == self.taken.keys(), set(now) ^ set(self.taken)
        for name, was in self.taken.items():
            if isinstance(was, Tensor) and was.is_meta:
                continue
            if isinstance(was, Tensor):
                assert_same_bits(name, _dense(now[name]), _dense(was))
            else:
                assert repr(now[name]) == repr(was), name


def _dense(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _copy(value: Any) -> Any:
    value = value.to_local() if hasattr(value, "to_local") else value  # this process's shard
    return value.detach().clone() if isinstance(value, Tensor) else value
