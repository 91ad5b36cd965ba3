"""Problems: weights and gradients of every kind that an optimizer meets, from ordinary to hostile.

Values are float32, made from a seed, and placed in memory in the type and layout that a test asks
for. Every problem has gradients for several steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

STEPS = 3


@dataclass(frozen=True)
class Entry:
    """One parameter: its value, a gradient for each step, and how it lies in memory."""

    weight: Tensor
    grads: tuple[Tensor, ...]
    layout: str = "contiguous"


@dataclass(frozen=True, repr=False)
class Problem:
    """A named list of parameters.

    Attributes:
        make: builds the entries, anew each time.
        half_range: whether the values fit float16.
        squares_fit: whether float32 holds the square of every gradient, as LAMB's second moment
            must.
        large: takes long enough to be left out of the full grid.
    """

    name: str
    make: Callable[[torch.Generator], list[Entry]]
    half_range: bool = True
    squares_fit: bool = True
    large: bool = False
    steps: int = field(default=STEPS)

    def __repr__(self) -> str:
        return self.name

    def entries(self) -> list[Entry]:
        return self.make(torch.Generator().manual_seed(20170813))


def place(values: Tensor, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """A tensor of its own with these values, in the given type and memory layout."""
    values = values.to(dtype)
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "misaligned":  # one element into a buffer: no vector-sized boundary
        buffer = torch.zeros(values.numel() + 1, dtype=dtype)
        return buffer[1:].view(values.shape).copy_(values)
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.t().contiguous().t()
    raise ValueError(f"no layout {layout!r}")


def _entry(
    generator: torch.Generator,
    shape: tuple[int, ...],
    *,
    weight: float = 0.5,
    grad: float = 0.1,
    layout: str = "contiguous",
    steps: int = STEPS,
) -> Entry:
    def normal(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    return Entry(normal(weight), tuple(normal(grad) for _ in range(steps)), layout)


def _shapes(*shapes: tuple[int, ...], **options: float) -> Callable[..., list[Entry]]:
    return lambda generator: [_entry(generator, shape, **options) for shape in shapes]  # type: ignore[arg-type]


def _layouts(generator: torch.Generator) -> list[Entry]:
    return [
        _entry(generator, (33,), layout="misaligned"),
        _entry(generator, (5, 67), layout="misaligned"),
        _entry(generator, (8, 3, 3, 5), layout="channels_last"),
        _entry(generator, (37, 11), layout="transposed"),
        _entry(generator, (1, 1)),
    ]


def _around_the_cut(generator: torch.Generator) -> list[Entry]:
    lanes, chunk = 32, 16384
    sizes = [1, 2, lanes - 1, lanes, lanes + 1, 2 * lanes + 1]
    sizes += [chunk - 1, chunk, chunk + 1, 2 * chunk + 17]
    return [_entry(generator, (size,)) for size in sizes]


def _spoiled(value: float, of_weight: bool) -> Callable[[torch.Generator], list[Entry]]:
    """One element of one tensor is NaN or infinite; its neighbours are ordinary tensors."""

    def make(generator: torch.Generator) -> list[Entry]:
        entries = [_entry(generator, (40,)) for _ in range(3)]
        victim = entries[1].weight if of_weight else entries[1].grads[0]
        victim[7] = value
        return entries

    return make


def _zeros(generator: torch.Generator) -> list[Entry]:
    shape = (3, 50)
    usual = _entry(generator, shape)
    zero = torch.zeros(shape)
    some = (zero, usual.grads[1], zero)
    return [
        Entry(zero, usual.grads),
        Entry(usual.weight, (zero,) * STEPS),
        Entry(zero, (zero,) * STEPS),
        Entry(usual.weight, some),
        Entry(-zero, some),
    ]


def _half_ends(generator: torch.Generator) -> list[Entry]:
    """Values at both ends of float16: subnormal ones and some near 65,504."""
    return [
        _entry(generator, (200,), weight=1e-6, grad=2e-7),
        _entry(generator, (200,), weight=9e3, grad=9e3),
        _entry(generator, (200,), weight=1.0, grad=2e-7),
    ]


ORDINARY = Problem("ordinary", _shapes((64, 3, 3, 3), (257,), (40, 33), ()))
PROBLEMS = (
    ORDINARY,
    Problem("zeros", _zeros),
    Problem("no dimensions", _shapes((), ())),
    Problem("empty", _shapes((0,), (4,), (3, 0, 5))),
    Problem("all empty", _shapes((0,), (0, 7))),
    Problem("around the cut", _around_the_cut),
    Problem("layouts", _layouts),
    Problem("ends of float16", _half_ends),
    # Their squares leave float32: a norm in float32 would be 0 or infinite.
    Problem("tiny", _shapes((300,), (17000,), weight=1e-25, grad=1e-25), half_range=False),
    Problem(
        "huge",
        _shapes((300,), (17000,), weight=1e25, grad=1e25),
        half_range=False,
        squares_fit=False,
    ),
    Problem("huge weights", _shapes((300,), weight=1e25, grad=1e15), half_range=False),
    Problem("huge gradients", _shapes((300,), grad=1e25), half_range=False, squares_fit=False),
    Problem("NaN gradient", _spoiled(float("nan"), of_weight=False)),
    Problem("infinite gradient", _spoiled(float("inf"), of_weight=False)),
    Problem("NaN weight", _spoiled(float("nan"), of_weight=True)),
    Problem("infinite weight", _spoiled(float("-inf"), of_weight=True)),
    Problem("one large", _shapes((2_000_003,)), large=True, steps=1),
    Problem("thousands", _shapes(*[(i % 9 + 1,) for i in range(2000)]), large=True, steps=1),
)
SMALL = tuple(problem for problem in PROBLEMS if not problem.large)
LARGE = tuple(problem for problem in PROBLEMS if problem.large)
