"""Host time of a step over DTensors, by mesh and placements, on a process group without a network.

``python -m benchmarks.step.sharded_host [TENSORS [ROUNDS]]``. The group is torch's fake one, whose
collectives return at once: what is timed is gathering, checking, measuring, and putting the sums
together. Tensors are small, so that the host's share is all there is. Optimizers take turns in one
process, on one thread; prints medians and 20th percentiles in microseconds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastlars
from benchmarks import results
from benchmarks.machine import describe
from benchmarks.timing import interleave

# name: the mesh, and the placements
MESHES: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "1 rank": ((1,), [Shard(0)]),
    "FSDP2, 8 ranks": ((8,), [Shard(0)]),
    "FSDP2, 8,192 ranks": ((8192,), [Shard(0)]),
    "HSDP, 1,024 x 8 ranks": ((1024, 8), [Replicate(), Shard(0)]),
    "replicated, 8 ranks": ((8,), [Replicate()]),
}
OPTIMIZERS: dict[str, Any] = {
    "LARS": lambda params: fastlars.LARS(params, lr=1e-6),
    "LAMB": lambda params: fastlars.LAMB(params, lr=1e-6),
    "LAMB, clipped": lambda params: fastlars.LAMB(params, lr=1e-6, max_grad_norm=1.0),
}


def parameters(mesh: Any, placements: list[Any], tensors: int) -> list[nn.Parameter]:
    """Parameters with gradients, of which this process has 4 x 4 elements each."""

    def spread() -> DTensor:
        return DTensor.from_local(torch.randn(4, 4), mesh, placements, run_check=False)

    params = [nn.Parameter(spread()) for _ in range(tensors)]
    for p in params:
        p.grad = spread()
    return params


def main(tensors: str = "161", rounds: str = "1000") -> int:
    """Print a table."""
    torch.set_num_threads(1)
    print(*describe().values(), f"{tensors} DTensors", sep=", ")
    lines = []
    for name, (shape, placements) in MESHES.items():
        world = torch.Size(shape).numel()
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        mesh = init_device_mesh("cpu", shape)
        steps = {
            key: make(parameters(mesh, placements, int(tensors))).step
            for key, make in OPTIMIZERS.items()
        }
        found = interleave(steps, int(rounds))
        dist.destroy_process_group()
        cells = [f"{s.median * 1e6:.0f} ({s.quantile(0.2) * 1e6:.0f})" for s in found.values()]
        lines.append([name, *cells])
    print(results.markdown(" | ".join(["mesh", *OPTIMIZERS]), "lr", lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
