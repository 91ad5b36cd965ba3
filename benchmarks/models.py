"""The models that are stepped: parameter shapes, parameters, and networks that train.

Shapes are written down, because machines with a GPU may lack torchvision; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Shapes = list[tuple[int, ...]]


def _linear(n_in: int, n_out: int) -> Shapes:
    return [(n_out, n_in), (n_out,)]


def _norm(width: int) -> Shapes:
    return [(width,), (width,)]


def resnet50_shapes() -> Shapes:
    """161 tensors, 25.6 M parameters."""

    def convolution(n_in: int, n_out: int, size: int) -> Shapes:
        return [(n_out, n_in, size, size), *_norm(n_out)]

    shapes = convolution(3, 64, 7)
    n_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(n_in, width, 1) + convolution(width, width, 3)
            shapes += convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(n_in, 4 * width, 1)  # of the shortcut
            n_in = 4 * width
    return shapes + _linear(n_in, 1000)


def bert_large_shapes() -> Shapes:
    """BERT-large with its pre-training heads: 398 tensors, 336 M parameters."""
    hidden, inner, vocabulary, positions = 1024, 4096, 30522, 512
    norm = _norm(hidden)
    embeddings: Shapes = [(vocabulary, hidden), (positions, hidden), (2, hidden), *norm]
    attention = 4 * _linear(hidden, hidden) + norm
    layer = attention + _linear(hidden, inner) + _linear(inner, hidden) + norm
    heads = _linear(hidden, hidden) + norm + [(vocabulary,)] + _linear(hidden, 2)
    return embeddings + 24 * layer + _linear(hidden, hidden) + heads


def vit_b_shapes() -> Shapes:
    """ViT-B/16: 152 tensors, 86.6 M parameters."""
    hidden, inner, patch, tokens = 768, 3072, 16, 197
    stem: Shapes = [(1, 1, hidden), (hidden, 3, patch, patch), (hidden,), (1, tokens, hidden)]
    attention = _norm(hidden) + _linear(hidden, 3 * hidden) + _linear(hidden, hidden)
    layer = attention + _norm(hidden) + _linear(hidden, inner) + _linear(inner, hidden)
    return stem + 12 * layer + _norm(hidden) + _linear(hidden, 1000)


def tiny_shapes() -> Shapes:
    """10,000 tensors of 64 elements: what a step costs that has next to nothing to move."""
    return [(64,)] * 10_000


def giant_shapes() -> Shapes:
    """One tensor of 500 M elements, of which nothing stays on chip between two passes."""
    return [(500_000_000,)]


SHAPES: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50_shapes,
    "bert_large": bert_large_shapes,
    "vit_b": vit_b_shapes,
    "tiny": tiny_shapes,
    "giant": giant_shapes,
}

# What a step costs as one tensor grows, and as tensors of 64 elements become more.
SWEEP: dict[str, Callable[[], Shapes]] = {
    **{f"1 x 1e{power}": (lambda n=10**power: [(n,)]) for power in (0, 2, 4, 6, 8, 9)},
    **{f"{count} x 64": (lambda n=count: [(64,)] * n) for count in (1, 10, 100, 1_000)},
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


class BertLarge(nn.Module):
    """BERT-large's encoder and its language-model head, on which masked tokens are predicted."""

    def __init__(self) -> None:
        super().__init__()
        hidden, tokens, positions = 1024, 30522, 512
        self.tokens = nn.Embedding(tokens, hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, hidden))
        layer = nn.TransformerEncoderLayer(
            hidden, 16, 4096, activation="gelu", batch_first=True, dropout=0.1
        )
        self.layers = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden))
        self.bias = nn.Parameter(torch.zeros(tokens))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of [sequences, tokens, vocabulary] for ids of [sequences, tokens]."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        return functional.linear(self.head(self.layers(x)), self.tokens.weight, self.bias)


def resnet50(device: torch.device, images: int, pixels: int) -> tuple[nn.Module, Any]:
    """The model, and its loss on one batch of noise."""
    from torchvision.models import resnet50 as build

    model = build().to(device, memory_format=torch.channels_last)
    batch = torch.randn(images, 3, pixels, pixels, device=device)
    batch = batch.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (images,), device=device)
    return model, lambda: functional.cross_entropy(model(batch), labels)


def bert_large(device: torch.device, sequences: int, tokens: int) -> tuple[nn.Module, Any]:
    """The model, and its loss on one batch of random tokens, of which 15% are predicted."""
    model = BertLarge().to(device)
    ids = torch.randint(30522, (sequences, tokens), device=device)
    chosen = torch.rand(ids.shape, device=device) < 0.15
    labels = torch.where(chosen, ids, -100)
    return model, lambda: functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
