"""Parameter shapes of the models that are stepped, in the order of their modules.

Written down rather than asked of torchvision, which machines with a GPU may lack;
tests/benchmarks/test_benchmarks.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def _linear(n_in: int, n_out: int) -> Shapes:
    return [(n_out, n_in), (n_out,)]


def _norm(width: int) -> Shapes:
    return [(width,), (width,)]


def resnet50() -> Shapes:
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


def bert_large() -> Shapes:
    """BERT-large with its pre-training heads: 398 tensors, 336 M parameters."""
    hidden, inner, vocabulary, positions = 1024, 4096, 30522, 512
    norm = _norm(hidden)
    embeddings: Shapes = [(vocabulary, hidden), (positions, hidden), (2, hidden), *norm]
    attention = 4 * _linear(hidden, hidden) + norm
    layer = attention + _linear(hidden, inner) + _linear(inner, hidden) + norm
    heads = _linear(hidden, hidden) + norm + [(vocabulary,)] + _linear(hidden, 2)
    return embeddings + 24 * layer + _linear(hidden, hidden) + heads


def vit_b() -> Shapes:
    """ViT-B/16: 152 tensors, 86.6 M parameters."""
    hidden, inner, patch, tokens = 768, 3072, 16, 197
    stem: Shapes = [(1, 1, hidden), (hidden, 3, patch, patch), (hidden,), (1, tokens, hidden)]
    attention = _norm(hidden) + _linear(hidden, 3 * hidden) + _linear(hidden, hidden)
    layer = attention + _norm(hidden) + _linear(hidden, inner) + _linear(inner, hidden)
    return stem + 12 * layer + _norm(hidden) + _linear(hidden, 1000)


def tiny() -> Shapes:
    """10,000 tensors of 64 elements: what a step costs that has next to nothing to move."""
    return [(64,)] * 10_000


def giant() -> Shapes:
    """One tensor of 500 M elements, of which nothing stays on chip between two passes."""
    return [(500_000_000,)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "bert_large": bert_large,
    "vit_b": vit_b,
    "tiny": tiny,
    "giant": giant,
}

# What a step costs as one tensor grows, and as tensors of 64 elements become more.
SWEEP: dict[str, Callable[[], Shapes]] = {
    **{f"1 x 1e{power}": (lambda n=10**power: [(n,)]) for power in (0, 2, 4, 6, 8, 9)},
    **{f"{count} x 64": (lambda n=count: [(64,)] * n) for count in (1, 10, 100, 1_000)},
}
