"""Weights that backward reads after their gradients are there, without autograd's knowledge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastlars
from distributed.overlap_cases import Result, result
from distributed.overlap_loops import MANY, loop, same
from distributed.processes import run
from fastlars.in_backward.engine import WATCHED_STEPS


class Keeps(torch.autograd.Function):
    """Keeps a weight where autograd does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: str) -> Tensor:
        ctx.weight, ctx.how = weight, how
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.weight.data if ctx.how == "data" else ctx.weight.detach()
        return grads[0] * weight.square().mean(), None, None


class Net(nn.Module):
    """Reads the weight of its middle layer in front of that layer too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.f, self.b = nn.Linear(33, 33), nn.Linear(33, 33), nn.Linear(33, 5)
        self.how = how
        self.wait: Any = lambda _: None

    def segment(self, h: Tensor) -> Tensor:
        return torch.tanh(F.linear(h, self.f.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how in ("data", "detach"):
            h = Keeps.apply(h, self.f.weight.detach(), self.how)
        else:
            h = checkpoint(self.segment, h, use_reentrant=self.how == "reentrant")
        if h.requires_grad:
            h.register_hook(self.wait)
        return self.b(torch.tanh(self.f(h)))


def loss_of(module: nn.Module, step: int) -> Tensor:
    torch.manual_seed(10 * step + dist.get_rank())
    return module(torch.randn(6, 33)).square().mean()


def start(
    how: str, overlapped: bool, make: type[Net] = Net, **options: Any
) -> tuple[Net, Any, Any]:
    torch.manual_seed(1)
    net = make(how)
    ddp = DistributedDataParallel(net, **MANY)
    optimizer = fastlars.LAMB(net.parameters(), lr=0.1)
    if overlapped:
        fastlars.distributed.overlap(ddp, optimizer, **options)

    def wait(_: Tensor) -> None:
        # Decides the race between the step and the read.
        if optimizer.overlap_hook is not None:
            for started in optimizer.overlap_hook.in_flight:
                started.future.wait()

    net.wait = wait
    return net, ddp, optimizer


def train(how: str, overlapped: bool, mode: str, make: type[Net] = Net) -> Result:
    net, ddp, optimizer = start(how, overlapped, make, mode=mode)
    return result(net, optimizer, early=loop(ddp, optimizer, loss=loss_of))


@pytest.mark.parametrize("how", ["recomputed", "reentrant", "detach", "data"])
def test_a_late_read_is_found_in_the_first_step(how: str) -> None:
    """The weight is left to step(), and all others are not."""
    (first, _) = same(partial(train, how), "step")
    assert first.early == [0, 0, 5, 5, 5]


def quiet(overlapped: bool, mode: str) -> Result:
    """A recomputed segment that trains what it reads."""
    net, ddp, optimizer = start("recomputed", overlapped, mode=mode)
    net.segment = lambda h: torch.tanh(F.linear(h, net.a.weight))  # type: ignore[method-assign]
    return result(net, optimizer, early=loop(ddp, optimizer, loss=loss_of))


def test_what_the_graph_knows_is_no_late_read() -> None:
    (first, _) = same(quiet)
    assert first.early == [0, 0, 6, 6, 6]


def begun_later(debug: bool) -> str:
    """The read begins after the steps that are watched."""
    net, ddp, optimizer = start("recomputed", True, debug=debug)
    segment = net.segment
    net.segment = torch.tanh  # type: ignore[method-assign]
    for step in range(WATCHED_STEPS + 3):
        if step == WATCHED_STEPS + 1:
            net.segment = segment  # type: ignore[method-assign]
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"{step}: {error}"
    return ""


def test_a_read_that_begins_later_needs_debug() -> None:
    begin = f"{WATCHED_STEPS + 1}: backward has read weights that were stepped already"
    for said in run(2, begun_later, True):
        assert said.startswith(f"{begin}, of shape (33, 33)")
    assert run(2, begun_later, False) == ["", ""]


@dataclass
class Output:
    logits: Tensor

    def square(self) -> Tensor:
        return self.logits.square()


class Wraps(Net):
    """Has an output that only DDP looks into."""

    def forward(self, x: Tensor) -> Any:
        return Output(super().forward(x))


def late_read(overlapped: bool, mode: str) -> Result:
    return train("recomputed", overlapped, mode, Wraps)


def test_a_late_read_of_a_dataclass() -> None:
    (first, _) = same(late_read)
    assert first.early == [0, 0, 5, 5, 5]


def logged(overlapped: bool, mode: str) -> Result:
    """Module hooks that log a weight's norm are no part of the gradients."""
    net, ddp, optimizer = start("recomputed", overlapped, mode=mode)
    seen = []

    def log(module: Any, *_: Any) -> None:
        seen.append(float(module.weight.norm()))

    for module in (net.a, net.b):
        module.register_full_backward_hook(log)
    return result(net, optimizer, early=loop(ddp, optimizer, loss=loss_of))


def test_module_hooks() -> None:
    (first, _) = same(logged)
    assert first.early[-1] == 5


def begins_to_write(overlapped: bool, mode: str) -> Result:
    """Buckets are stepped early from some step on, and only then are late reads looked for."""
    net, ddp, optimizer = start("recomputed", overlapped, mode=mode)
    optimizer.skip_if = 1e6
    loop(ddp, optimizer, WATCHED_STEPS + 2, loss_of)
    optimizer.skip_if = None
    return result(net, optimizer, early=loop(ddp, optimizer, 4, loss_of))


def test_late_reads_are_looked_for_when_writing_begins() -> None:
    (first, _) = same(begins_to_write)
    assert first.early == [0, 0, 5, 5]


def of_one_storage(overlapped: bool, mode: str) -> Result:
    """The late read is of one of two parameters in the same memory."""
    return train("recomputed", overlapped, mode, Flat)


class Flat(Net):
    def __init__(self, how: str) -> None:
        super().__init__(how)
        flat = torch.cat([self.f.weight.detach().flatten(), self.f.bias.detach()])
        self.f.weight = nn.Parameter(flat[: 33 * 33].view(33, 33))
        self.f.bias = nn.Parameter(flat[33 * 33 :])


def test_late_reads_of_parameters_in_one_storage() -> None:
    (first, _) = same(of_one_storage)
    assert first.early == [0, 0, 4, 4, 4]
