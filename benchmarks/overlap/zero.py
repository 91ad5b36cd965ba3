"""Iterations with states sharded by FSDP2 and by ZeroRedundancyOptimizer, next to plain DDP.

``python -m benchmarks.overlap.zero [--rounds N] [--csv OUT.csv]``

Two gloo processes with a thread each train the same model in all ways, which take turns round by
round; prints medians, ratios round by round, and what a process holds. Then the partition that
ZeroRedundancyOptimizer makes for 16 processes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastlars
from benchmarks import results
from benchmarks.machine import describe
from benchmarks.models import SHAPES, Shapes

PROCESSES = 2
WARM_UP = 3  # DDP rebuilds its buckets after the first step
# Small: the ways must end at the same weights, though they add up gradients in other orders.
RULES: dict[str, Callable[..., Any]] = {"LARS": fastlars.LARS, "LAMB": fastlars.LAMB}
RATES = {"LARS": 1e-2, "LAMB": 1e-5}


def small_layers() -> nn.Sequential:
    """200 tensors, 0.4 M parameters, in 10 blocks."""
    blocks = [
        nn.Sequential(*[part for _ in range(10) for part in (nn.Linear(64, 64), nn.Tanh())])
        for _ in range(10)
    ]
    return nn.Sequential(*blocks)


def resnet50() -> nn.Module:
    """161 tensors, 25.6 M parameters."""
    import torchvision.models

    return torchvision.models.resnet50()


# name: model, its blocks, shape of a process's batch
TRAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], list[Any]], tuple[int, ...]]] = {
    "200 small tensors": (small_layers, list, (32, 64)),
    "ResNet-50": (
        resnet50,
        lambda model: [b for layer in (1, 2, 3, 4) for b in getattr(model, f"layer{layer}")],
        (8, 3, 32, 32),
    ),
}


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Contender:
    """A model and its optimizer; ``way`` is one of ``WAYS``."""

    def __init__(self, way: str, rule: str, name: str) -> None:
        make, blocks, shape = TRAINED[name]
        torch.manual_seed(0)
        model = make()
        options: dict[str, Any] = {"lr": RATES[rule], "weight_decay": 1e-4}
        if "FSDP2" in way:
            mesh = init_device_mesh("cpu", (PROCESSES,))
            for part in (model,) if "whole" in way else (*blocks(model), model):
                fully_shard(part, mesh=mesh, reshard_after_forward=False)
        else:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if "ZeRO" in way:
            self.optimizer: Any = ZeroRedundancyOptimizer(
                model.parameters(), RULES[rule], parameters_as_bucket_view="view" in way, **options
            )
        else:
            self.optimizer = RULES[rule](model.parameters(), **options)
        self.model = model
        torch.manual_seed(1 + dist.get_rank())
        self.batch = torch.randn(shape)

    def iterate(self) -> tuple[float, float]:
        """Seconds of an iteration, and of its step."""
        dist.barrier()
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        middle = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        return end - begin, end - middle

    def weights(self) -> Tensor:
        """All of them, on each process."""
        full = [p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return torch.cat([p.detach().flatten() for p in full])

    def held(self) -> dict[str, int]:
        """Bytes of what this process keeps between two iterations."""
        params = list(self.model.parameters())
        inner = getattr(self.optimizer, "optim", self.optimizer)
        states = [s for p in params if p in inner.state for s in inner.state[p].values()]
        kinds = {"weights": params, "gradients": [p.grad for p in params], "states": states}
        return {
            kind: sum(here(t).nbytes for t in tensors if t is not None)
            for kind, tensors in kinds.items()
        }


WAYS = ("DDP", "FSDP2", "FSDP2, whole model", "DDP and ZeRO", "DDP and ZeRO, bucket view")


def check(contenders: dict[str, Contender], start: Tensor) -> None:
    """No time without a right result: all ways have moved the weights to the same place."""
    expected = contenders["DDP"].weights()
    moved = torch.linalg.vector_norm(expected - start)
    for way, contender in contenders.items():
        off = torch.linalg.vector_norm(contender.weights() - expected)
        if not (moved > 0 and off < 1e-2 * moved):
            raise RuntimeError(f"{way} is {float(off / moved):.1e} of the way away from DDP")


def connect(rank: int, folder: str) -> None:
    """Join the other processes, with one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", PROCESSES), rank=rank,
        world_size=PROCESSES, timeout=timedelta(seconds=120),
    )  # fmt: skip


def work(rank: int, folder: str, rounds: int) -> None:
    """One of the processes; the first one writes what it saw."""
    connect(rank, folder)
    seen: list[dict[str, Any]] = []
    for name in TRAINED:
        for rule in RULES:
            contenders = {way: Contender(way, rule, name) for way in WAYS}
            start = contenders["DDP"].weights()
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for number in range(WARM_UP + rounds):
                for way, contender in contenders.items():
                    found = contender.iterate()
                    if number >= WARM_UP:
                        times[way].append(found)
                if number == WARM_UP - 1:
                    check(contenders, start)
            held = {way: contender.held() for way, contender in contenders.items()}
            seen += rows(name, rule, times, held)
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def rows(
    model: str,
    rule: str,
    times: dict[str, list[tuple[float, float]]],
    held: dict[str, dict[str, int]],
) -> list[dict[str, Any]]:
    """One line for each way; times in ms, ratios to DDP's of the same round."""
    lines = []
    for way, each in times.items():
        pairs = list(zip(each, times["DDP"], strict=True))
        line: dict[str, Any] = {"model": model, "rule": rule, "way": way}
        for i, what in enumerate(("iteration", "step")):
            line[f"{what}_ms"] = f"{1e3 * statistics.median(t[i] for t in each):.2f}"
            line[f"{what}_over_ddp"] = f"{statistics.median(t[i] / d[i] for t, d in pairs):.2f}"
        line |= {f"{kind}_mb": f"{size / 1e6:.1f}" for kind, size in held[way].items()}
        lines.append(line | {"rounds": len(each)})
    return lines


def balance(shapes: Shapes, processes: int) -> float:
    """Elements of the process with the most, over the mean, as ZeroRedundancyOptimizer has it.

    In a fake process group of at least so many.
    """
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    group = dist.new_group(list(range(processes)))
    optimizer = ZeroRedundancyOptimizer(params, torch.optim.SGD, process_group=group, lr=0.0)
    sizes = [
        sum(p.numel() for part in parts for p in part["params"])
        for parts in optimizer._partition_parameters()
    ]
    return max(sizes) * processes / sum(sizes)


def rows_balance(shapes: Shapes, processes: int) -> float:
    """The same of FSDP2, which cuts every tensor along its first dimension."""
    sizes = [(shape[0], torch.Size(shape).numel()) for shape in shapes]
    largest = sum(-(-first // processes) * (size // first) for first, size in sizes)
    return largest * processes / sum(size for _, size in sizes)


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    return results.markdown(
        "model | rule | | iteration, ms | over DDP's | step, ms | over DDP's | weights, "
        "gradients, states of a process, MB",
        "lllr",
        (
            f"{x['model']} | {x['rule']} | {x['way']} | {x['iteration_ms']} "
            f"| {x['iteration_over_ddp']} | {x['step_ms']} | {x['step_over_ddp']} "
            f"| {x['weights_mb']}, {x['gradients_mb']}, {x['states_mb']}"
            for x in lines
        ),
    )


def balances() -> str:
    """Of three models, for 2, 8 and 16 processes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    out = []
    ways = {"ZeroRedundancyOptimizer": balance, "FSDP2": rows_balance}
    for name in ("resnet50", "vit_b", "bert_large"):
        for way, of in ways.items():
            found = [f"{of(SHAPES[name](), processes):.2f}" for processes in (2, 8, 16)]
            out.append([f"{name}, {way}", *found])
    dist.destroy_process_group()
    return results.markdown("largest share of a process over the mean | 2 | 8 | 16", "lr", out)


def run(doc: str, work: Callable[..., None], markdown: Callable[..., str]) -> None:
    """Measure in PROCESSES processes, print a table, and write the CSV where asked."""
    options, where = results.parser(doc, rounds=31).parse_args(), describe()
    print(*where.values(), f"{PROCESSES} gloo processes", sep=", ", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, options.rounds), PROCESSES)
        lines = json.loads(Path(folder, "rows").read_text())
    results.publish(markdown(lines), [line | where for line in lines], options.csv)


if __name__ == "__main__":
    run(__doc__, work, markdown)
    print(f"\n{balances()}")
