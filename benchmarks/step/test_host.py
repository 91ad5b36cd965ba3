"""Host time of a step: Python and checks, for as many tensors as ResNet-50 has, and as small ones
as their ranks allow without a size of 1.

What the compiled call takes for such tensors is timed beside it, so that the rest can be read off.
DTensors are on a mesh of one process: what a step under FSDP2 costs the host, but for the network.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastlars
from benchmarks.models import parameters, resnet50_shapes
from benchmarks.timing import interleave
from fastlars.backends.cpu import Cpu

ROUNDS = 2001


OPTIMIZERS: dict[str, Any] = {
    "fastlars LARS": lambda params: fastlars.LARS(params, lr=1e-6),
    "fastlars LAMB": lambda params: fastlars.LAMB(params, lr=1e-6),
    "torch SGD(fused)": lambda params: torch.optim.SGD(params, lr=1e-6, momentum=0.9, fused=True),
    "torch SGD(foreach)": lambda params: torch.optim.SGD(params, lr=1e-6, momentum=0.9),
    "torch AdamW(fused)": lambda params: torch.optim.AdamW(params, lr=1e-6, fused=True),
}
OURS = {"SGD": "fastlars LARS", "AdamW": "fastlars LAMB"}  # what stands against torch's
ROWS = [
    *((name, False) for name in OPTIMIZERS if name != "torch SGD(foreach)"),
    # torch 2.15 has no SGD(fused) for DTensors.
    *((name, True) for name in OPTIMIZERS if name != "torch SGD(fused)"),
]
LIMIT_S = 5.0


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def spread(params: list[torch.Tensor], mesh: DeviceMesh) -> list[torch.Tensor]:
    """The parameters as DTensors, their gradients too."""
    from torch.distributed.tensor import Shard, distribute_tensor

    shards = []
    for p in params:
        shard = torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        assert p.grad is not None
        shard.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        shards.append(shard)
    return shards


@pytest.mark.parametrize(("name", "sharded"), ROWS)
def test_host(
    benchmark: Any,
    name: str,
    sharded: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    torch.set_num_threads(1)
    # Tensors of one element take a check more than others.
    params = parameters(
        [tuple(min(size, 8) for size in s) if s[1:] else (64,) for s in resnet50_shapes()]
    )
    if sharded:
        params = spread(params, request.getfixturevalue("mesh"))
    optimizer = OPTIMIZERS[name](params)
    optimizer.step()
    calls = {"step": optimizer.step}
    if name.startswith("torch"):
        calls["fastlars"] = OPTIMIZERS[OURS[type(optimizer).__name__]](params).step
    elif not sharded:
        calls["kernel"] = last_call(optimizer, monkeypatch)
    samples = interleave(calls, ROUNDS, limit_s=LIMIT_S)
    what = "DTensors" if sharded else "tensors"
    benchmark.group = f"host, 161 small {what}"
    step = samples["step"]
    benchmark.extra_info.update(
        contender=name,
        version=importlib.metadata.version(name.split()[0]),
        p20_ms=step.quantile(0.2) * 1e3,
        p50_ms=step.median * 1e3,
        p80_ms=step.quantile(0.8) * 1e3,
        rounds=len(step.seconds),
        parameters=len(params),
        threads=1,
    )
    if "kernel" in samples:
        benchmark.extra_info["kernel_ms"] = samples["kernel"].median * 1e3
    if "fastlars" in samples:
        benchmark.extra_info["fastlars_over_this"] = samples["fastlars"].median / step.median
    benchmark.pedantic(optimizer.step, rounds=100, warmup_rounds=5)


def last_call(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The compiled call that the optimizer's step makes, to be made again by itself."""
    seen: list[Any] = []
    real = Cpu.step

    def spy(self: Cpu, *arguments: Any) -> torch.Tensor:
        seen[:] = [self, *arguments]
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Cpu, "step", spy)
        optimizer.step()
    return lambda: real(*seen)
