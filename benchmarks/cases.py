"""What is benchmarked: parameter shapes of real models, and the optimizers that step them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fastlars

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """161 tensors, 25.6 M parameters."""
    from torchvision.models import resnet50 as build

    with torch.device("meta"):
        return [tuple(p.shape) for p in build().parameters()]


def bert_large() -> Shapes:
    """BERT-large with its pre-training heads: 398 tensors, 336 M parameters."""
    hidden, inner, vocabulary, positions = 1024, 4096, 30522, 512

    def linear(n_in: int, n_out: int) -> Shapes:
        return [(n_out, n_in), (n_out,)]

    norm: Shapes = [(hidden,), (hidden,)]
    embeddings: Shapes = [(vocabulary, hidden), (positions, hidden), (2, hidden), *norm]
    attention = 4 * linear(hidden, hidden) + norm
    layer = attention + linear(hidden, inner) + linear(inner, hidden) + norm
    heads = linear(hidden, hidden) + norm + [(vocabulary,)] + linear(hidden, 2)
    return embeddings + 24 * layer + linear(hidden, hidden) + heads


MODELS: dict[str, Callable[[], Shapes]] = {"resnet50": resnet50, "bert_large": bert_large}


@dataclass(frozen=True)
class Contender:
    """An optimizer to be timed.

    Attributes:
        build: makes the optimizer from parameters.
        bytes_per_parameter: the least that its rule must move: fp32 arrays read and written. None
            where the implementation makes passes that nobody counted.
        package: whose version belongs beside the number.
    """

    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    package: str
    bytes_per_parameter: int | None = None


# Small enough that hundreds of steps leave the weights ordinary numbers.
LR = 1e-6
DECAY = 1e-4


def _timm(name: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        import timm.optim

        options = {"momentum": 0.9} if name == "Lars" else {"max_grad_norm": None}
        # The eager loop, which is what timm's users have had for years.
        return getattr(timm.optim, name)(
            params, lr=LR, weight_decay=DECAY, foreach=False, **options
        )

    return build


def _foreach(name: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        import pytorch_optimizer

        kind = getattr(pytorch_optimizer, name)
        return kind(params, lr=LR, weight_decay=DECAY, foreach=True)

    return build


LARS: dict[str, Contender] = {
    "fastlars": Contender(lambda ps: fastlars.LARS(ps, lr=LR, weight_decay=DECAY), "fastlars", 20),
    "torch SGD(fused)": Contender(
        lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9, weight_decay=DECAY, fused=True),
        "torch",
        20,
    ),
    "timm Lars": Contender(_timm("Lars"), "timm"),
    "pytorch_optimizer LARS(foreach)": Contender(_foreach("LARS"), "pytorch_optimizer"),
}
LAMB: dict[str, Contender] = {
    "fastlars": Contender(lambda ps: fastlars.LAMB(ps, lr=LR, weight_decay=DECAY), "fastlars", 28),
    "torch AdamW(fused)": Contender(
        lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=DECAY, fused=True), "torch", 28
    ),
    "timm Lamb": Contender(_timm("Lamb"), "timm"),
    "pytorch_optimizer Lamb(foreach)": Contender(_foreach("Lamb"), "pytorch_optimizer"),
}
RULES: dict[str, dict[str, Contender]] = {"lars": LARS, "lamb": LAMB}


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Parameters with gradients, of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=generator).mul_(0.05))
        p.grad = torch.randn(shape, generator=generator).mul_(1e-3)
        params.append(p)
    return params
