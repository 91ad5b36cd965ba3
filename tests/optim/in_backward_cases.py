"""Models and a training loop for tests of steps inside backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlars
from fastlars.in_backward.engine import WATCHED_STEPS
from fastlars.in_backward.released import is_released
from optimizers import SIMPLE, Row, assert_same, parameters

TINY = 40 / 2**20  # bucket_mb of which ten float32 numbers make a bucket
WIDE = 25.0  # the default, in which all gradients of a small model wait for step()
row_of = {row.kind.__name__: row for row in SIMPLE}


class Net(nn.Module):
    """Every parameter of optimizers.SHAPES, one after the other, so that gradients arrive one after
    the other. ``dropped`` are left out of the next forward pass."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ParameterList(parameters(dtype))
        self.dropped: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for i, p in enumerate(self.layers):
            if i not in self.dropped:
                x = (p * x).tanh().sum() + x
        return x


@dataclass
class Trained:
    params: list[Tensor]
    states: list[Tensor]
    ratios: list[float]
    norms: list[float] = field(default_factory=list)
    early: list[int] = field(default_factory=list)  # at each step, parameters stepped before step()

    def assert_same(self, other: Trained) -> None:
        assert_same("weight", self.params, other.params)
        assert_same("state", self.states, other.states)
        assert self.ratios == other.ratios
        assert self.norms == other.norms


def result(net: nn.Module, optimizer: Any, **others: Any) -> Trained:
    ratios = optimizer.trust_ratios()
    return Trained(
        [p.detach().clone() for p in net.parameters()],
        [v.clone() for p in net.parameters() for _, v in sorted(optimizer.state[p].items())],
        [ratios[p] for p in net.parameters() if p in ratios],
        **others,
    )


def inputs(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients are in proportion to it: at every third step they are small."""
    return torch.tensor(0.001 if step % 3 == 2 else 0.1 + 0.01 * (step % 7), dtype=dtype)


def early_of(net: nn.Module) -> int:
    return sum(is_released(p.grad) for p in net.parameters())


def train(
    net: Any,
    optimizer: Any,
    handle: Any = None,
    steps: int = WATCHED_STEPS + 3,
    before: Callable[[int], None] = lambda step: None,
    passes: int = 1,
    measures: bool = False,
) -> Trained:
    """An ordinary loop; ``passes`` accumulate, ``measures`` runs a norm pass where there is a
    handle."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    norms, early = [], []
    dtype = next(net.parameters()).dtype
    for step in range(steps):
        before(step)
        optimizer.zero_grad()
        for part in range(passes):
            last = part == passes - 1
            with nullcontext() if last or handle is None else handle.accumulate():
                loss = net(inputs(passes * step + part, dtype))
                if measures and handle is not None:
                    with handle.norm_pass():
                        loss.backward(retain_graph=True)
                loss.backward()
        early.append(early_of(net))
        optimizer.step()
        assert not any(is_released(p.grad) for p in net.parameters())
        norms.append(-1.0 if optimizer.grad_norm is None else float(optimizer.grad_norm))
        schedule.step()
    return result(net, optimizer, norms=norms, early=early)


def both(
    row: Row,
    bucket_mb: float = TINY,
    except_for: Callable[[Net], list[Any]] = lambda net: [],
    make: Callable[[Row], Any] = lambda row: Net(row.dtype),
    overrides: dict[str, Any] | None = None,
    **loop: Any,
) -> Trained:
    """Train twice, and compare; the run that stepped in backward."""
    runs = []
    for steps_early in (False, True):
        net = make(row)
        optimizer = row.make(net.parameters(), **copy.deepcopy(overrides or {}))
        handle = None
        if steps_early:
            handle = fastlars.step_in_backward(
                net, optimizer, bucket_mb=bucket_mb, except_for=except_for(net)
            )
        own = dict(loop)
        if "drops" in own:
            own["before"] = own.pop("drops")(net)
        runs.append(train(net, optimizer, handle, **own))
    plain, early = runs
    early.assert_same(plain)
    assert plain.early == [0] * len(plain.early)
    return early


def early_pair(
    net: nn.Module | None = None, bucket_mb: float = TINY, **options: Any
) -> tuple[Any, Any, Any]:
    """A model, LARS, and its handle."""
    net = Net() if net is None else net
    optimizer = row_of["LARS"].make(net.parameters(), **options)
    return net, optimizer, fastlars.step_in_backward(net, optimizer, bucket_mb=bucket_mb)


def change_weights(net: Net, _: Any) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)


class Recomputing(Net):
    """One layer of two is computed again during backward; the first weight is used by all."""

    def __init__(self, reentrant: bool, shares: bool) -> None:
        super().__init__()
        self.reentrant, self.shares = reentrant, shares

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        shared = self.layers[0]
        for p in list(self.layers)[1:]:

            def block(x: Tensor, p: Tensor = p) -> Tensor:
                own = (p * x).tanh().sum() + x
                return own + (shared * own).mean() if self.shares else own

            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x + shared.sum() * x
