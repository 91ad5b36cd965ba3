"""A small model that FSDP2 shards, and runs of it with overlap and without, for 2 processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from distributed.overlap_cases import CLASSES, RATES, Result, count_early
from distributed.sharded_cases import Collectives, Moved, cpu_mesh, groups, here
from fastlars.distributed import overlap

EVERY = 14  # parameters of Net; groups() adapts all but the last


class Net(nn.Module):
    """With blocks that a step may skip. 5 rows over 2 ranks are uneven; a row is on one rank."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.bare = False  # leaves the norm out
        blocks = [nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(5, 1)
        self.skipped: set[int] = set()
        self.reentrant = reentrant  # of activation checkpointing; None for none

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        x = x if self.bare else self.norm(x)
        for number, block in enumerate(self.blocks):
            if number in self.skipped:
                continue
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


def net(
    make: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Sharded over all processes, block by block."""
    torch.manual_seed(3)
    model = make().to(dtype)
    mesh = cpu_mesh(dist.get_world_size())
    options.setdefault("reshard_after_forward", False)  # less to send
    for part in (*model.blocks, model):  # type: ignore[misc]
        fully_shard(part, mesh=mesh, **options)
    return model


class Run:
    """A model in training, and what was seen of its steps.

    Attributes:
        early: at each step, parameters that were measured before ``step()``.
        moved: what each step has moved between processes.
    """

    def __init__(
        self,
        overlapped: bool,
        kind: str = "LAMB",
        mode: Any = "step",
        model: Any = None,
        sharded: Any = None,
        grouped: bool = True,
        debug: bool = False,
        **options: Any,
    ) -> None:
        self.module = net() if model is None else model
        self.params: list[Any] = list(self.module.parameters())
        members: Any = groups(self.params) if grouped else self.params
        usual = {"lr": RATES[kind], "weight_decay": 0.01}
        self.optimizer: Any = CLASSES[kind](members, **{**usual, **options})
        self.handle = None
        if overlapped:
            self.handle = overlap(sharded or self.module, self.optimizer, mode=mode, debug=debug)
        self.early: list[int] = []
        self.moved: list[Moved] = []

    def loss(self, number: int) -> Tensor:
        """Of other inputs on each rank and in each step."""
        generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        x = torch.randn(4, 6, generator=generator).to(self.params[0].dtype)
        return (self.module(x).float() - 1.0).square().mean()

    def backward(self, number: int) -> None:
        self.loss(number).backward()

    def step(self, step: Callable[[], Any] | None = None) -> None:
        self.early.append(count_early(self.optimizer))
        with Collectives() as collectives:
            (step or self.optimizer.step)()
        self.moved.append(collectives.seen)

    def go(self, numbers: Iterable[int]) -> Run:
        for number in numbers:
            self.optimizer.zero_grad()
            self.backward(number)
            self.step()
        return self

    def result(self) -> Result:
        states = [v for p in self.params for _, v in sorted(self.optimizer.state[p].items())]
        ratios = self.optimizer.trust_ratios()
        return Result(
            [here(p).clone() for p in self.params],
            [here(value).clone() for value in states],
            [ratios[p] for p in self.params if p in ratios],
            [float(self.optimizer.skipped_steps)],
            self.early,
        )


@contextmanager
def failing(module: nn.Module) -> Iterator[None]:
    """An error in backward when it comes to the outputs of ``module``."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("as asked")

    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(fail)

    handle = module.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


Loop = Callable[[bool], Run]


def compare(loops: dict[str, Loop]) -> dict[str, list[int]]:
    """By name, what was early in the overlapped run, which ends with the bits of the other one, and
    has moved the same."""
    early = {}
    for name, loop in loops.items():
        try:
            torch.manual_seed(11)  # of stochastic rounding
            plain = loop(False)
            torch.manual_seed(11)
            overlapped = loop(True)
            overlapped.result().assert_same(plain.result())
            assert overlapped.moved == plain.moved
        except Exception as error:
            raise AssertionError(f"in {name}: {error}") from error
        early[name] = overlapped.early
    return early
