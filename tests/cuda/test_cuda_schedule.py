"""The one-launch path ends for any number of blocks or slots, any speed, and has the same bits.

It is held against two launches of one block, whose order is fixed. A chunk that is applied twice,
or never, or with another step's ratio, shows in momentum and moments. Blocks run on a GPU, or, in
the process that test_cuda_on_cpu.py starts, on the CPU, at random speeds, not all of them at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch

from backend_cases import BF16, DEFAULTS, F16, OPTIONS, PLAIN, Dtypes, Row
from device_cases import Twin, assert_same_runs, marks
from fastlars.backends.cuda import Cuda, CudaLayout
from problems import Entry, Problem
from tolerances import assert_same_bits

pytestmark = marks("cuda")
CHUNK = 4096
# Nesterov's LAMB reads again what LAMB does not: the gradients of chunks that were evicted.
AHEAD = next(row for row in OPTIONS if row.name == "LAMB nesterov both, decay gradient")
ADAPTING = [*(row for row in DEFAULTS if row.rule.adapt), AHEAD]
MOST_BLOCKS = 12
slow = partial(pytest.param, marks=pytest.mark.slow)


def _most_slots() -> int:
    """Chunks, 16 KB each, that a block can cache: three on GPUs of compute capability 7.5."""
    if not torch.cuda.is_available():
        return 4
    room: int = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    return min(4, (room - 2048) // 2**14)


MOST_SLOTS = _most_slots()


def _problem(name: str, sizes: list[int], steps: int) -> Problem:
    def make(generator: torch.Generator) -> list[Entry]:
        values = [torch.randn(size, generator=generator) for size in sizes]
        return [Entry(w, tuple((0.1 + s) * w.flip(0) for s in range(steps))) for w in values]

    return Problem(name, make, steps=steps)


def _resnet18() -> list[int]:
    """Elements of ResNet-18's tensors; on a CPU without the last stage, three quarters of them."""
    stages = (64, 128, 256, 512) if torch.cuda.is_available() else (64, 128, 256)
    sizes = [3 * 64 * 49, 64, 64]
    before = 64
    for width in stages:
        for block in range(2):
            sizes += [before * width * 9, width, width, width * width * 9, width, width]
            if before != width and block == 0:
                sizes += [before * width, width, width]
            before = width
    return [*sizes, before * 1000, 1000]


# Chunks by tensor, and what is hard about them.
LISTS = {
    "one tensor for all blocks": [40 * CHUNK + 5],
    "a chunk each": [1, CHUNK, 7, CHUNK - 1, 100, 2] * 6,
    "larger than all slots, then small": [60 * CHUNK, 3, 2 * CHUNK, 3, 3],
    "small, then larger than all slots": [3, 3, 2 * CHUNK, 3, 60 * CHUNK],
    "growing": [i * CHUNK + i for i in range(9)],
    "empty between": [0, CHUNK, 0, 0, 2 * CHUNK + 1, 0],
    "all empty": [0, 0],
    "several launches": [5, CHUNK + 1] * 245,
}
MIXED = [3 * CHUNK, 1, 17 * CHUNK + 3, 0, CHUNK, 2 * CHUNK - 1, 9, 7 * CHUNK, 5]


class Scheduled(Twin):
    """A run whose tables outlive a step, and with them what a launch leaves for the next."""

    def __init__(self, row: Row, problem: Problem, path: str, dtypes: Dtypes = PLAIN) -> None:
        super().__init__("cuda", row, dtypes, problem)
        self.cuda = Cuda()
        self.cuda.path, self.cuda.grid = path, 1
        self.backend = self.cuda
        self.layout: CudaLayout = self.cuda.layout(self.tensors.weights)

    def advance(self, step: int) -> torch.Tensor:
        self.take_gradients(step)
        bound = self.cuda.bind(self.tensors, self.layout)
        return self.cuda.step(self.row.rule, bound, self.row.now(step))


def _compare(tested: Scheduled, choose: Callable[[int], tuple[int, int]]) -> None:
    """Steps with the blocks and shared slots of each step's choice."""
    row, problem = tested.row, tested.problem
    expected = Scheduled(row, problem, "two-launch", tested.tensors.dtypes)
    for step in range(problem.steps):
        tested.cuda.grid, tested.cuda.shared_slots = choose(step)
        what = f"step {step}, {tested.cuda.grid} blocks, {tested.cuda.shared_slots} shared slots"
        report = expected.advance(step).cpu()
        assert_same_bits(f"report, {what}", tested.advance(step).cpu(), report)
        assert_same_runs(what, tested, expected)


@pytest.fixture(autouse=True)
def _speeds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random ones, the same for a test whenever it runs; a GPU has its own."""
    seed = random.Random(request.node.name).randrange(2**32)
    monkeypatch.setenv("FASTLARS_EMULATED_SEED", str(seed))


@pytest.mark.parametrize("row", ADAPTING, ids=lambda row: row.name)
@pytest.mark.parametrize("grid", [1, 2, 5, *(slow(grid) for grid in (3, 4, *range(6, 13)))])
def test_every_grid_and_number_of_slots(grid: int, row: Row) -> None:
    tested = Scheduled(row, _problem("mixed", MIXED, MOST_SLOTS), "one-launch")
    _compare(tested, lambda step: (grid, step + 1))


@pytest.mark.parametrize("row", ADAPTING, ids=lambda row: row.name)
@pytest.mark.parametrize("name", LISTS)
def test_awkward_lists(name: str, row: Row) -> None:
    draw = random.Random(name)
    tested = Scheduled(row, _problem(name, LISTS[name], 6), "one-launch")
    _compare(tested, lambda _: (draw.randint(1, MOST_BLOCKS), draw.randint(1, MOST_SLOTS)))


@pytest.mark.slow
@pytest.mark.parametrize("row", ADAPTING, ids=lambda row: row.name)
def test_resnet18(row: Row) -> None:
    choices = [(1, 1), (12, 2), (5, MOST_SLOTS)]
    tested = Scheduled(row, _problem("ResNet-18", _resnet18(), len(choices)), "one-launch")
    assert tested.layout.table.tensors == (62 if torch.cuda.is_available() else 47)
    _compare(tested, choices.__getitem__)


@pytest.mark.parametrize(
    "dtypes", [Dtypes(BF16, F16, BF16), Dtypes(torch.float32, BF16, BF16, F16)]
)
@pytest.mark.parametrize("row", ADAPTING, ids=lambda row: row.name)
def test_types(row: Row, dtypes: Dtypes) -> None:
    tested = Scheduled(row, _problem("mixed", MIXED, 4), "one-launch", dtypes)
    _compare(tested, lambda step: (3 * step + 1, step % MOST_SLOTS + 1))


@pytest.mark.parametrize("row", [*DEFAULTS, AHEAD], ids=lambda row: row.name)
def test_two_launches_of_every_grid(row: Row) -> None:
    tested = Scheduled(row, _problem("mixed", MIXED, MOST_BLOCKS), "two-launch")
    _compare(tested, lambda step: (step + 1, 0))


@pytest.mark.parametrize("row", ADAPTING, ids=lambda row: row.name)
def test_paths_in_turn(row: Row) -> None:
    """Each leaves the tables as the other needs them."""
    tested = Scheduled(row, _problem("mixed", MIXED, 4), "one-launch")

    def choose(step: int) -> tuple[int, int]:
        tested.cuda.path = ("one-launch", "two-launch")[step // 2 % 2]
        return 3 + step, 2

    _compare(tested, choose)
