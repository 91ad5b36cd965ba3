"""Small networks and a training loop for tests of the overlap; all of it runs in new processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlars
from optimizers import SIMPLE
from tolerances import assert_same_bits

CLASSES = {row.kind.__name__: row.kind for row in SIMPLE}
# As large as makes a bit that differs grow in a few steps.
RATES = {**dict.fromkeys(CLASSES, 0.1), "LARS": 2.0, "LAMB": 0.02, "LANS": 0.02}
BATCH = 4  # images of a process


def resnet() -> nn.Module:
    """ResNet-18 with an eighth of the channels, and a norm that does not look at other images."""
    # Here, so that tests of other networks need no torchvision.
    from torchvision.models.resnet import BasicBlock, ResNet

    class Narrow(ResNet):
        def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
            return super()._make_layer(block, planes // 8, *args, **kwargs)

    net = Narrow(BasicBlock, [2, 2, 2, 2], norm_layer=lambda width: nn.GroupNorm(2, width))
    net.fc = nn.Linear(64, 10)
    return net


def convolutions() -> nn.Module:
    """With a scalar and weights that lie channels last."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.PReLU(),
        nn.Conv2d(8, 12, 3),
        nn.GroupNorm(2, 12),
        nn.Flatten(),
        nn.Linear(12 * 25, 10),
    ).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Setting:
    """One training run.

    Attributes:
        overlap: keyword arguments of overlap(), or None for none.
        optimizer: keyword arguments of the optimizer, beside the usual ones.
        ddp: keyword arguments of DDP.
        keep: whether zero_grad leaves zeros, not None.
        backwards: backward passes of a step, all but the last under no_sync.
    """

    kind: str = "LARS"
    net: Callable[[], nn.Module] = convolutions
    overlap: dict[str, Any] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    steps: int = 6
    keep: bool = False
    backwards: int = 1
    dtype: torch.dtype = torch.float32


@dataclass
class Result:
    """What a run ended with."""

    params: list[Tensor]
    states: list[Tensor]
    ratios: list[float]
    losses: list[float]
    early: list[int]  # at each step, parameters whose bucket was under way before step()

    def assert_same(self, other: Result) -> None:
        """To the bit, but for what is early."""
        for what in ("params", "states"):
            pairs = zip(getattr(self, what), getattr(other, what), strict=True)
            for i, (mine, theirs) in enumerate(pairs):
                assert_same_bits(f"{what} {i}", mine, theirs)
        assert self.ratios == other.ratios
        assert self.losses == other.losses


def images(step: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    pixels = torch.randn(BATCH, 3, 16, 16, generator=generator)
    return pixels.to(dtype), torch.randint(10, (BATCH,), generator=generator)


def make(setting: Setting) -> nn.Module:
    torch.manual_seed(3)
    return setting.net().to(setting.dtype)


def make_optimizer(setting: Setting, net: nn.Module) -> Any:
    """Two groups, so that a bucket has parameters of both."""
    # A copy: schedules write into a learning rate that is a tensor.
    options = {"lr": RATES[setting.kind], "weight_decay": 1e-3, **deepcopy(setting.optimizer)}
    groups = fastlars.parameter_groups(net, weight_decay=options.pop("weight_decay"))
    return CLASSES[setting.kind](groups, **options)


def train(setting: Setting) -> Result:
    """In a process of a group."""
    net = make(setting)
    ddp = DistributedDataParallel(net, **setting.ddp)
    optimizer = make_optimizer(setting, net)
    if setting.overlap is not None:
        fastlars.distributed.overlap(ddp, optimizer, **setting.overlap)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    early, losses = [], []
    for step in range(setting.steps):
        optimizer.zero_grad(set_to_none=not setting.keep)
        for backward in range(setting.backwards):
            last = backward == setting.backwards - 1
            x, y = images(setting.backwards * step + backward, dist.get_rank(), setting.dtype)
            with nullcontext() if last else ddp.no_sync():
                loss = nn.functional.cross_entropy(ddp(x), y)
                loss.backward()
        early.append(count_early(optimizer))
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
    return result(net, optimizer, losses, early)


def is_ahead(kind: str, mode: str, clips: bool = False) -> bool:
    """Whether buckets are under way before ``step()``: LAMB cannot be measured without a write."""
    return clips or mode == "step" or kind == "LARS"


def count_early(optimizer: Any) -> int:
    if optimizer.overlap_hook is None:
        return 0
    return sum(len(started.params()) for started in optimizer.overlap_hook.in_flight)


def result(
    net: nn.Module, optimizer: Any, losses: list[float] | None = None, early: Any = ()
) -> Result:
    params = list(net.parameters())
    states = [value for p in params for _, value in sorted(optimizer.state[p].items())]
    ratios = optimizer.trust_ratios()
    return Result(
        [p.detach().clone() for p in params],
        [value.clone() for value in states],
        [ratios[p] for p in params if p in ratios],
        losses or [],
        list(early),
    )


def train_all(*settings: Setting) -> list[Result]:
    """One after the other, in the same processes."""
    return [train(setting) for setting in settings]


def buckets(setting: Setting) -> int:
    """How many buckets DDP has from the second step on."""
    ddp = DistributedDataParallel(make(setting), **setting.ddp)
    for step in range(2):
        x, y = images(step, dist.get_rank(), setting.dtype)
        nn.functional.cross_entropy(ddp(x), y).backward()
    return len(ddp.reducer._get_zeros_like_grad_buckets())


def train_joined(setting: Setting, size: int) -> Result:
    """All processes' images in this one, without a group."""
    net = make(setting)
    optimizer = make_optimizer(setting, net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    for step in range(setting.steps):
        optimizer.zero_grad()
        pairs = [images(step, rank, setting.dtype) for rank in range(size)]
        x, y = (torch.cat(each) for each in zip(*pairs, strict=True))
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    return result(net, optimizer)
