"""The optimizers that are timed against each other, rule by rule."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

import fastlars
from fastlars.backends import choose

# Small enough that hundreds of steps leave the weights ordinary numbers.
LR = 1e-6
DECAY = 1e-4

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer to be timed.

    Attributes:
        build: makes the optimizer from parameters.
        package: whose version belongs beside the number.
        bytes_per_parameter: the least that its rule must move: every array read and written once.
            None where the implementation makes passes that nobody counted.
        backend: what FASTLARS_BACKEND is while fastlars plans the first step; None leaves the
            choice to fastlars, as users do.
        path: what FASTLARS_CUDA_PATH is meanwhile.
        graph: the step is recorded into a CUDA graph, and its replay is timed.
        exact: the rule is fastlars's to the last detail, so that its steps must be the same.
    """

    build: Build
    package: str
    bytes_per_parameter: int | None = None
    backend: str | None = None
    path: str | None = None
    graph: bool = False
    exact: bool = False

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Optimizers that take their first step in here are served by what the contender names."""
        wanted = {"FASTLARS_BACKEND": self.backend, "FASTLARS_CUDA_PATH": self.path}
        chosen = {name: value for name, value in wanted.items() if value is not None}
        with mock.patch.dict(os.environ, chosen), warnings.catch_warnings():
            # Of a slower back end; the table says which one it was.
            warnings.filterwarnings("ignore", message="fastlars steps ")
            # A back end reads its path once, and is kept; optimizers keep the one they planned for.
            choose.instance.cache_clear()
            try:
                yield
            finally:
                choose.instance.cache_clear()

    def started(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Its optimizer, after the first step, for which it was planned."""
        with self.planning():
            optimizer = self.build(params)
            optimizer.step()
        return optimizer


def timm(name: str) -> Build:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        import timm.optim

        options = {"momentum": 0.9} if name == "Lars" else {"max_grad_norm": None}
        # The eager loop, which is what timm's users have had for years.
        return getattr(timm.optim, name)(
            params, lr=LR, weight_decay=DECAY, foreach=False, **options
        )

    return build


def pytorch_optimizer(name: str) -> Build:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        import pytorch_optimizer as package

        return getattr(package, name)(params, lr=LR, weight_decay=DECAY, foreach=True)

    return build


def optax(name: str) -> Build:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        from benchmarks.step.optax_step import OptaxStep

        return OptaxStep(params, name, LR, DECAY)  # type: ignore[return-value]

    return build


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=DECAY, fused=True)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)


def rmsprop(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    # foreach: torch has no fused one.
    return torch.optim.RMSprop(
        params, lr=LR, momentum=0.9, alpha=0.99, weight_decay=DECAY, foreach=True
    )


def rmsprop_warmup(**options: float) -> Build:
    return lambda params: fastlars.RMSpropWarmup(params, lr=LR, weight_decay=DECAY, **options)


LARS: dict[str, Contender] = {
    "fastlars": Contender(
        lambda ps: fastlars.LARS(ps, lr=LR, weight_decay=DECAY), "fastlars", 20, exact=True
    ),
    "torch SGD(fused)": Contender(sgd, "torch", 20),
    "timm Lars": Contender(timm("Lars"), "timm"),
    "pytorch_optimizer LARS(foreach)": Contender(pytorch_optimizer("LARS"), "pytorch_optimizer"),
    "optax lars(jit)": Contender(optax("lars"), "optax"),
}
LAMB: dict[str, Contender] = {
    "fastlars": Contender(
        lambda ps: fastlars.LAMB(ps, lr=LR, weight_decay=DECAY), "fastlars", 28, exact=True
    ),
    "torch AdamW(fused)": Contender(adamw, "torch", 28),
    "timm Lamb": Contender(timm("Lamb"), "timm"),
    "pytorch_optimizer Lamb(foreach)": Contender(pytorch_optimizer("Lamb"), "pytorch_optimizer"),
    "optax lamb(jit)": Contender(optax("lamb"), "optax"),
}
LANS: dict[str, Contender] = {
    "fastlars": Contender(
        lambda ps: fastlars.LANS(ps, lr=LR, weight_decay=DECAY), "fastlars", 28, exact=True
    ),
    "torch AdamW(fused)": Contender(adamw, "torch", 28),
}
# Far from its center, where nearly all of it is RMSprop; and from the second step on warmed up.
RMSPROP: dict[str, Contender] = {
    "fastlars": Contender(
        rmsprop_warmup(center_steps=1e6, period_steps=1e5), "fastlars", 28, exact=True
    ),
    "torch RMSprop(foreach)": Contender(rmsprop, "torch"),
}
WARM: dict[str, Contender] = {
    "fastlars": Contender(
        rmsprop_warmup(center_steps=0, period_steps=1, lr_rmsprop=0.0), "fastlars", 20, exact=True
    ),
    "torch SGD(fused)": Contender(sgd, "torch", 20),
}
RULES: dict[str, dict[str, Contender]] = {
    "lars": LARS,
    "lamb": LAMB,
    "lans": LANS,
    "rmsprop": RMSPROP,
    "rmsprop-warm": WARM,
}
