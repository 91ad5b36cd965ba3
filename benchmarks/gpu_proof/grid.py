"""Blocks of a launch, and chunks that a block keeps in shared memory: which are the fastest?"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.gpu_proof.stages import folder
from benchmarks.machine import Gpu, Machine
from benchmarks.models import parameters
from benchmarks.results import plain_table, write_csv, write_text
from benchmarks.step.cases import TARGETS, Case, gpu_contenders
from benchmarks.step.contenders import adamw, sgd

CHUNK_BYTES = 2**14


def launches(multiprocessors: int, shared_bytes: int) -> list[tuple[str, int, int]]:
    """Path, blocks, chunks in shared memory as far as they fit; 0 is what the back end chooses."""
    m = multiprocessors
    two = [("two-launch", blocks, 0) for blocks in (0, 2 * m, 3 * m, 4 * m)]
    settings = ((0, 0), (3 * m, 3), (3 * m, 2), (2 * m, 4), (2 * m, 6), (m, 8), (m, 13))
    fitting = [(blocks, slots) for blocks, slots in settings if slots * CHUNK_BYTES < shared_bytes]
    return two + [("one-launch", blocks, slots) for blocks, slots in fitting]


def measure(
    machine: Machine,
    tried: list[tuple[str, int, int]],
    out: Path,
    cases: list[Case],
    limit_s: float = 4.0,
) -> int:
    """Measure case by case, and write what is known after each; 1 where a launch fails."""
    rows, status = [], 0
    for case in cases:
        params = parameters(case.shapes(), machine.device)
        fused = (sgd if case.rule == "lars" else adamw)(params)
        fused.step()
        calls: dict[tuple[str, int, int], Callable[[], object]] = {
            ("torch fused", 0, 0): fused.step
        }
        for path, blocks, slots in tried:
            try:
                calls[path, blocks, slots] = _step(case, params, path, blocks, slots)
            except Exception as error:
                print(f"{case}: {path}, {blocks} blocks, {slots} slots: {error}", flush=True)
                status = 1
        machine.wait()
        named = {str(key): call for key, call in calls.items()}
        waits = dict.fromkeys(named, machine.wait)
        hosts = timing.interleave(named, 15, between=waits, limit_s=limit_s / 4)
        leads = {name: timing.lead(host) for name, host in hosts.items()}
        found = timing.interleave_device(named, 31, machine, leads=leads, limit_s=limit_s)
        base = found[str(("torch fused", 0, 0))].median
        for path, blocks, slots in calls:
            median = found[str((path, blocks, slots))].median
            figures = {"us": f"{median * 1e6:.1f}", "over torch fused": f"{median / base:.3f}"}
            place = {"case": case, "path": path, "blocks": blocks, "shared_slots": slots}
            rows.append(place | figures)
        write_csv(out / "grid.csv", rows)
        write_text(out / "grid.md", plain_table(rows))
        del calls, named, fused, params
        gc.collect()
        torch.cuda.empty_cache()
    print(plain_table(rows))
    return status


def _step(
    case: Case, params: list[torch.nn.Parameter], path: str, blocks: int, slots: int
) -> Callable[[], object]:
    optimizer = gpu_contenders(case)[f"fastlars cuda {path}"].started(params)
    # Each contender has a back end of its own.
    with torch.no_grad():
        backend = optimizer.bind_groups()[0].backend
    backend.grid, backend.shared_slots = blocks, slots
    optimizer.step()
    return optimizer.step


if __name__ == "__main__":
    gpu = Gpu()
    raise SystemExit(
        measure(gpu, launches(gpu.multiprocessors, gpu.shared_bytes), folder(), TARGETS)
    )
