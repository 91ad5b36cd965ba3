"""The step that is left after backward under FSDP2, with overlap and without.

``python -m benchmarks.overlap.fsdp [--rounds N] [--csv OUT.csv]``

Two gloo processes with a thread each train the models of zero.py, sharded block by block; both ways
take turns in the same processes, and must end at the same bits. Prints medians, and ratios round by
round.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastlars.distributed
from benchmarks import results
from benchmarks.overlap.zero import RULES, TRAINED, Contender, connect, run
from fastlars.in_backward.engine import WATCHED_STEPS

KINDS = ("plain_ms", "overlap_ms", "ratio")
WARM_UP = WATCHED_STEPS + 1  # in which overlap takes checksums


def work(rank: int, folder: str, rounds: int) -> None:
    """One of the processes; the first one writes what it saw."""
    connect(rank, folder)
    seen: list[dict[str, Any]] = []
    for name in TRAINED:
        for rule in RULES:
            both = [Contender("FSDP2", rule, name) for _ in range(2)]
            fastlars.distributed.overlap(both[1].model, both[1].optimizer)
            times: list[list[tuple[float, float]]] = []
            for number in range(WARM_UP + rounds):
                order = (0, 1) if number % 2 == 0 else (1, 0)
                found = {i: both[i].iterate() for i in order}
                if number >= WARM_UP:
                    times.append([found[0], found[1]])
            if not torch.equal(both[0].weights(), both[1].weights()):
                raise RuntimeError("overlap does not have the bits of FSDP2 without it")
            seen.append({"model": name, "rule": rule, **figures(times), "rounds": rounds})
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def figures(times: Sequence[Sequence[Sequence[float]]]) -> dict[str, str]:
    """Of the iteration and of the step: ms without overlap and with it, and the ratio."""
    found = {}
    for i, what in enumerate(("iteration", "step")):
        for way, each in zip(("plain", "overlap"), zip(*times, strict=True), strict=True):
            found[f"{what}_{way}_ms"] = f"{1e3 * statistics.median(t[i] for t in each):.2f}"
        ratio = statistics.median(after[i] / before[i] for before, after in times)
        found[f"{what}_ratio"] = f"{ratio:.2f}"
    return found


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    columns = ("model", "rule", *(f"{w}_{k}" for w in ("step", "iteration") for k in KINDS))
    return results.markdown(
        "model | rule | step, ms | with overlap | ratio | iteration, ms | with overlap | ratio",
        "llr",
        ([line[column] for column in columns] for line in lines),
    )


if __name__ == "__main__":
    run(__doc__, work, markdown)
