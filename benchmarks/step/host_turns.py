"""Host time of a step in this checkout and in another one, in turns.

``python -m benchmarks.step.host_turns CHECKOUT [ROUNDS]``

Pairs of processes, one for each checkout, both built, on one thread. In each round a process times
a block of steps of each optimizer, over 161 plain tensors and 161 DTensors of 16 elements, so that
the host's share is all there is. Prints medians over pairs of medians over rounds: microseconds,
and this checkout's time over the other's, with the least and the greatest ratio of a pair.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import ROOT, results

TENSORS, BLOCK, WARM_UP = 161, 50, 2
# Times of two processes of one checkout differ by up to a twentieth, whatever the rounds.
PAIRS = 7


def parameters(count: int) -> list[Any]:
    """Plain tensors of 16 elements, with gradients."""
    import torch

    made = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(count)]
    for p in made:
        p.grad = torch.randn(4, 4)
    return made


def median_us(optimizer: Any) -> float:
    """The median of a block of steps, in microseconds."""
    seconds = []
    for _ in range(BLOCK):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


def optimizers() -> dict[str, Any]:
    """By name, after a first step, which plans."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import fastlars
    from benchmarks.step import sharded_host

    print(Path(fastlars.__file__).parent.parent, flush=True)
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (8,))
    found: dict[str, Any] = {}
    for kind in (fastlars.LARS, fastlars.LAMB):
        plain = parameters(TENSORS)
        sharded = sharded_host.parameters(mesh, [Shard(0)], TENSORS)
        for what, params in (("tensors", plain), ("DTensors", sharded)):
            found[f"{kind.__name__}, {TENSORS} {what}"] = kind(params, lr=1e-6)
    for optimizer in found.values():
        optimizer.step()
    return found


def answer() -> None:
    """The child: a line of times, name by name, for each line that comes."""
    made = optimizers()
    print("; ".join(made), flush=True)
    for _ in sys.stdin:
        print(*map(median_us, made.values()), flush=True)


def child(checkout: Path) -> subprocess.Popen[str]:
    """A process that steps with the fastlars of a checkout."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # The benchmark of this checkout, and then fastlars of the other one, which may have another.
    code = "import sys; from benchmarks.step import host_turns; sys.path.insert(0, sys.argv[1]); "
    return subprocess.Popen(
        [sys.executable, "-c", code + "host_turns.answer()", str(checkout)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd="/",
        **pipes,
    )


def pair(other: Path, rounds: int) -> dict[str, tuple[float, float, float]]:
    """By name, medians over the rounds of two new processes: this time, the other, their ratio."""
    children = [child(ROOT), child(other)]
    times: list[list[list[float]]] = [[], []]
    names: list[str] = []
    for process, checkout in zip(children, (ROOT, other), strict=True):
        assert process.stdout is not None
        imported = process.stdout.readline().strip()
        assert imported == str(checkout), f"{checkout} imports fastlars from {imported}"
        names = process.stdout.readline().strip().split("; ")
    for turn in range(rounds + WARM_UP):
        for process, seen in zip(children, times, strict=True):
            assert process.stdin is not None
            assert process.stdout is not None
            print(turn, file=process.stdin, flush=True)
            seen.append([float(x) for x in process.stdout.readline().split()])
    for process in children:
        process.communicate()
    found = {}
    for i, name in enumerate(names):
        this, that = ([row[i] for row in seen[WARM_UP:]] for seen in times)
        ratio = statistics.median(a / b for a, b in zip(this, that, strict=True))
        found[name] = (statistics.median(this), statistics.median(that), ratio)
    return found


def main(other: str, rounds: str = "30") -> int:
    """Print a table."""
    found = [pair(Path(other).resolve(), int(rounds)) for _ in range(PAIRS)]
    lines = []
    for name in found[0]:
        this, that, ratios = zip(*(each[name] for each in found), strict=True)
        middle = [statistics.median(x) for x in (this, that, ratios)]
        numbers = (f"{middle[0]:.1f}", f"{middle[1]:.1f}", f"{middle[2]:.3f}")
        lines.append([name, *numbers, f"{min(ratios):.3f} to {max(ratios):.3f}"])
    headings = "step | this, us | other, us | this / other | of the pairs"
    print(results.markdown(headings, "lr", lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
