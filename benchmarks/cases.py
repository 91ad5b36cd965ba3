"""What is benchmarked: the optimizers that step, and how a step is checked before it is timed."""

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
from shapes import Shapes

# Small enough that hundreds of steps leave the weights ordinary numbers.
LR = 1e-6
DECAY = 1e-4
# Large enough that a step shows in bfloat16 weights.
CHECK_LR = {"lars": 100.0, "lamb": 0.1, "lans": 0.1, "rmsprop": 1e-4, "rmsprop-warm": 0.1}
# A chunk and a bit, many chunks, and tensors with a ragged end.
CHECK_SHAPES: Shapes = [(64, 32), (32, 16, 3, 3), (301, 100), (3,)]
# Roundings of sums in another order; in bfloat16 a few weights then fall on the other side.
CHECK_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Record = Callable[[Callable[[], object]], Callable[[], object]]


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
        from optax_step import OptaxStep

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


def parameters(
    shapes: Shapes,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[nn.Parameter]:
    """Parameters with gradients, of ordinary size."""
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: tuple[int, ...], size: float) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return values.mul_(size)

    params = []
    for shape in shapes:
        p = nn.Parameter(random(shape, 0.05))
        p.grad = random(shape, 1e-3)
        params.append(p)
    return params


def gradients(params: list[nn.Parameter]) -> list[torch.Tensor]:
    """The parameters' gradients, all of which :func:`parameters` made."""
    return [p.grad for p in params if p.grad is not None]


def _moved(
    contender: Contender, rule: str, params: list[nn.Parameter], record: Record
) -> list[torch.Tensor]:
    """How far three steps move the weights, on the CPU."""
    before = [p.detach().clone() for p in params]
    grads = gradients(params)
    saved = [g.clone() for g in grads]
    with contender.planning():
        optimizer = contender.build(params)
        for group in optimizer.param_groups:
            group["lr"] = CHECK_LR[rule]
        step: Callable[[], object] = optimizer.step
        for number in range(3):
            step()
            torch._foreach_copy_(grads, saved)
            if number == 0 and contender.graph:
                step = record(step)
        if hasattr(optimizer, "settle"):  # it steps copies of its own
            optimizer.settle()
    after = [p.detach() for p in params]
    return [(a.double() - b.double()).cpu() for a, b in zip(after, before, strict=True)]


def check(
    contender: Contender,
    ours: Contender,
    rule: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    record: Record = lambda call: call,
) -> None:
    """No time without a right result: three steps on a small problem move the weights alike.

    Args:
        contender: whose steps are looked at; exact ones are held to the specification's numbers,
            others, whose rules differ in details, to their direction.
        ours: fastlars, of which the reference back end on the CPU takes the same steps.
        device: where the contender's steps are taken.
        dtype: of the parameters; low precision goes with masters.
        record: makes a CUDA graph of a step, for contenders that are to be recorded.
    """
    original = parameters(CHECK_SHAPES, dtype=dtype)
    copies = []
    for p in original:
        copy = nn.Parameter(p.detach().clone().to(device))
        copy.grad = p.grad.clone().to(device) if p.grad is not None else None
        copies.append(copy)
    specification = Contender(ours.build, ours.package, backend="reference")
    moved = (
        _moved(contender, rule, copies, record),
        _moved(specification, rule, original, record),
    )
    for mine, right in zip(*moved, strict=True):
        assert mine.abs().sum() > 0.0, "the step moves nothing"
        cosine = torch.nn.functional.cosine_similarity(mine.flatten(), right.flatten(), dim=0)
        assert cosine > 0.99, f"the step points elsewhere: cosine {float(cosine):.4f}"
        if contender.exact:
            error = float((mine - right).norm() / right.norm())
            assert error < CHECK_ERROR[dtype], f"the step is off by {error:.2g} of its length"
