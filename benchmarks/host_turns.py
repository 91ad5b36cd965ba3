"""Host time of a step in this checkout and in another one, in turns.

``python benchmarks/host_turns.py CHECKOUT [ROUNDS]``: a process for each checkout, both built, on
one thread. In every round each process times a block of steps of each optimizer, over 161 plain
tensors and over 161 DTensors of 16 elements, so that the host's share is all there is. Prints
medians in microseconds, and the median over rounds of this checkout's time over the other's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TENSORS, BLOCK = 161, 50
ROOT = Path(__file__).resolve().parent.parent


def optimizers() -> dict[str, Any]:
    """By name, after a first step, which plans."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import fastlars
    import sharded_host

    print(Path(fastlars.__file__).parent.parent, flush=True)
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (8,))
    found: dict[str, Any] = {}
    for kind in (fastlars.LARS, fastlars.LAMB):
        plain = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(TENSORS)]
        for p in plain:
            p.grad = torch.randn(4, 4)
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
        medians = []
        for optimizer in made.values():
            seconds = []
            for _ in range(BLOCK):
                start = time.perf_counter()
                optimizer.step()
                seconds.append(time.perf_counter() - start)
            medians.append(statistics.median(seconds) * 1e6)
        print(*medians, flush=True)


def child(checkout: Path) -> subprocess.Popen[str]:
    """A process that steps with the fastlars of a checkout."""
    path = os.pathsep.join([str(checkout), str(ROOT / "benchmarks")])
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Not in the script's own folder: the checkout comes first on the path.
    code = "import host_turns; host_turns.answer()"
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd="/", **pipes
    )


def main(other: str, rounds: str = "100") -> int:
    """Print a table."""
    children = [child(ROOT), child(Path(other).resolve())]
    times: list[list[list[float]]] = [[], []]
    names: list[str] = []
    for process in children:
        assert process.stdout is not None
        print(process.stdout.readline().strip())
        names = process.stdout.readline().strip().split("; ")
    for turn in range(int(rounds) + 2):
        for process, seen in zip(children, times, strict=True):
            assert process.stdin is not None
            assert process.stdout is not None
            print(turn, file=process.stdin, flush=True)
            seen.append([float(x) for x in process.stdout.readline().split()])
    for process in children:
        process.communicate()
    print("| step | this, us | other, us | this / other |\n|---|--:|--:|--:|")
    for i, name in enumerate(names):
        this, that = ([row[i] for row in seen[2:]] for seen in times)
        ratio = statistics.median(a / b for a, b in zip(this, that, strict=True))
        print(f"| {name} | {statistics.median(this):.1f} | {statistics.median(that):.1f} |", end="")
        print(f" {ratio:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
