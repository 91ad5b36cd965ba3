"""fastlars.step_in_backward: the bits of ordinary steps, and the memory of a bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlars
from backend_cases import NAMES
from benchmarks import RESULTS
from benchmarks.overlap import in_backward
from benchmarks.results import read_csv
from fastlars.in_backward.released import is_released
from optim.in_backward_cases import (
    TINY,
    WIDE,
    Net,
    Recomputing,
    both,
    row_of,
    train,
)
from optimizers import BF16, ROWS, SIMPLE, Row, one_thread
from repository_files import ROOT, python_blocks

__all__ = ["one_thread"]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_the_bits_of_ordinary_steps(row: Row) -> None:
    """From the first step on, all but what waits at the end is stepped during backward."""
    early = both(row).early
    assert min(early) >= 3, early


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("options", [{"maximize": True}, {"lr": torch.tensor(0.1)}], ids=str)
def test_options_that_no_row_has(row: Row, options: dict[str, Any]) -> None:
    both(row, overrides=options)


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_buckets(row: Row) -> None:
    every = both(row, bucket_mb=1e-9)
    assert every.early == [5] * len(every.early)  # one parameter each
    wide = both(row, bucket_mb=WIDE)
    assert wide.early == [0] * len(wide.early)  # all wait, and step() steps them


ROUNDED = [
    Row(f"{row.name}, rounded", row.kind, {**row.options, "stochastic_rounding": True}, BF16)
    for row in SIMPLE
]


@pytest.mark.parametrize("row", ROUNDED, ids=repr)
@pytest.mark.parametrize("passes", [1, 2])
def test_stochastic_rounding(row: Row, passes: int) -> None:
    """The random bits do not depend on the buckets, and the generator ends in the same state."""
    ends = []

    def make(row: Row) -> Net:
        ends.append(torch.get_rng_state())
        torch.manual_seed(5)
        return Net(row.dtype)

    assert min(both(row, make=make, passes=passes).early) >= 2
    make(row)
    assert torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("row", ROUNDED, ids=repr)
def test_stochastic_rounding_and_layers_that_are_unfrozen(row: Row) -> None:
    def unfreezing(net: Net) -> Callable[[int], None]:
        def before(step: int) -> None:
            net.layers[1].requires_grad_(step >= 3)
            net.layers[3].requires_grad_(step < 6)

        return before

    def make(row: Row) -> Net:
        torch.manual_seed(5)
        return Net(row.dtype)

    both(row, make=make, drops=unfreezing)


def dropping(net: Net) -> Callable[[int], None]:
    def before(step: int) -> None:
        net.dropped = ((), (1,), (0, 3), (1, 2), (4,))[step % 5]

    return before


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_layers_that_are_dropped(row: Row) -> None:
    both(row, drops=dropping)


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_accumulation(row: Row) -> None:
    assert min(both(row, passes=3).early) >= 3


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("exempt", [0, 2])
def test_except_for(row: Row, exempt: int) -> None:
    early = both(row, 1e-9, except_for=lambda net: list(net.layers)[:exempt]).early
    assert early == [5 - exempt] * len(early)


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_if": 1.0}], ids=str)
def test_a_norm_pass(row: Row, options: dict[str, Any]) -> None:
    """Clipped and skipped as an ordinary step is, with the same norm."""
    kept = both(row, overrides=options, measures=True, except_for=lambda net: [net.layers[0]])
    bound = next(iter(options.values()))
    assert min(kept.norms) < bound < max(kept.norms), kept.norms


def test_skip_if_is_asked_once_a_step() -> None:
    asked: list[float] = []
    net = Net()
    optimizer = row_of["LARS"].make(net.parameters())
    optimizer.skip_if = lambda norm: asked.append(float(norm)) or len(asked) % 2 == 0
    handle = fastlars.step_in_backward(net, optimizer, bucket_mb=TINY)
    train(net, optimizer, handle, steps=6, measures=True)
    assert len(asked) == 6
    assert int(optimizer.skipped_steps) == 3


def test_gradients_take_a_bucket_of_memory() -> None:
    """At every arrival: the gradients that are there, against all of them."""
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))
    optimizer = fastlars.LAMB(net.parameters(), lr=0.01)
    size = 64 * 64 * 4
    fastlars.step_in_backward(net, optimizer, bucket_mb=3 * size / 2**20)
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        most = max(most, sum(g.nbytes for g in grads if not is_released(g)))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(count)
    for step in range(2):
        net(torch.randn(4, 64)).square().sum().backward()
        optimizer.step()
        assert most == 2 * size, step  # the third makes a bucket, which is stepped at once


MEMORY = """
import sys, torch, fastlars
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
torch.set_num_threads(1)
net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(48)))
optimizer = fastlars.LARS(net.parameters(), lr=0.01)
if sys.argv[1] == "early":
    fastlars.step_in_backward(net, optimizer, bucket_mb=8)
for _ in range(3):
    optimizer.zero_grad()
    net(torch.randn(4, 1024)).square().mean().backward()
    optimizer.step()
print(peak())
"""


def test_the_peak_of_a_process() -> None:
    """48 layers of 4 MiB: their gradients, but for a bucket of 8 MiB, are no longer needed."""
    from subprocess_tests import python

    peaks = {}
    for how in ("plain", "early"):
        done = python("-c", MEMORY, how, MALLOC_MMAP_THRESHOLD_="65536")
        assert done.returncode == 0, done.stdout
        peaks[how] = int(done.stdout.split()[-1]) / 1024
    assert peaks["plain"] - peaks["early"] > 0.9 * (48 * 4 - 8), peaks


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(row: Row, reentrant: bool) -> None:
    early = both(row, make=lambda _: Recomputing(reentrant, shares=False)).early
    assert min(early) >= 3


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_if": 1.0}], ids=str)
def test_back_ends(
    row: Row, options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where lr, norm and verdict stay on the device, and with counters for a CUDA graph."""
    monkeypatch.setenv("FASTLARS_BACKEND", backend)
    reads_device = backend not in ("cpu", "reference")
    given = {**options, "lr": torch.tensor(0.1), "capturable": reads_device}
    assert min(both(row, overrides=given, measures=bool(options), steps=5).early) >= 3


def test_the_blocks_of_the_page() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    section = page[page.index("\n## One device") : page.index("\n## Overlap")]
    first, second = python_blocks(section)
    names: dict[str, Any] = {}
    losses = []
    real = nn.functional.cross_entropy

    def noted(*arguments: Any) -> Tensor:
        losses.append(float(real(*arguments).detach()))
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "cross_entropy", noted)
        exec(first, names)
        exec(second, names)
    assert len(losses) == 41
    assert float(names["optimizer"].grad_norm) > 0.0
    assert all(p.grad is None for p in names["model"].parameters())


def test_the_table_is_the_one_that_was_measured() -> None:
    table = in_backward.markdown(read_csv(RESULTS / "in_backward.csv"))
    assert table in (ROOT / "docs" / "distributed.md").read_text()
