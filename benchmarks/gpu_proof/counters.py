"""ncu's hardware counters of a step by each CUDA path: bytes that reach the memory, L2 hits.

``python -m benchmarks.gpu_proof.counters MODEL RULE`` takes a few steps, for ncu to look at.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_proof import process
from benchmarks.gpu_proof.stages import folder
from benchmarks.models import parameters
from benchmarks.results import every_column, plain_table, write_csv, write_text
from benchmarks.step.cases import TARGETS, Case, gpu_contenders
from fastlars.backends.cuda import PATHS

LIMIT_S = 50.0
# ncu's name: column, and by how much a value is multiplied
METRICS = {
    "gpu__time_duration.sum": ("us", 1e-3),
    "dram__bytes_read.sum": ("read B a parameter", None),
    "dram__bytes_write.sum": ("written B a parameter", None),
    "lts__t_sector_hit_rate.pct": ("L2 hits %", 1.0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("warps active %", 1.0),
    "smsp__inst_issued.avg.pct_of_peak_sustained_active": ("issue slots %", 1.0),
}


def steps(case: Case, device: torch.device, number: int = 3) -> None:
    """Some steps by each path; the first launches are not looked at."""
    every = gpu_contenders(case)
    optimizers = [
        every[f"fastlars cuda {path}"].started(parameters(case.shapes(), device)) for path in PATHS
    ]
    for _ in range(number):
        for optimizer in optimizers:
            optimizer.step()


def command(ncu: str, case: Case) -> list[str]:
    """Three launches, those of a step by both paths, after six that warm the clocks up."""
    looked_at = ("-k", "regex:(^|::)(measure|apply|step)$", "--launch-skip", "6", "-c", "3")
    # What a launch finds in the L2 cache is asked for: it must not be emptied before.
    how = ("--csv", "--print-units", "base", "--clock-control", "none", "--cache-control", "none")
    step = (sys.executable, "-m", "benchmarks.gpu_proof.counters", case.model, case.rule)
    return [ncu, *looked_at, *how, "--metrics", ",".join(METRICS), *step]


def rows(case: Case, output: str) -> list[dict[str, Any]]:
    """A row for each launch, from what ncu prints between other lines."""
    numel = sum(torch.Size(shape).numel() for shape in case.shapes())
    start = re.search(r'^"ID",', output, re.MULTILINE)
    found: dict[str, dict[str, Any]] = {}
    lines = output[start.start() :].splitlines() if start else []
    for line in csv.DictReader(line for line in lines if line.startswith('"')):
        column, factor = METRICS.get(line["Metric Name"], ("", 1.0))
        value = line["Metric Value"].replace(",", "")
        if not column or not re.fullmatch(r"[-+.\de]+", value):  # such as n/a
            continue
        kernel = re.search(r"\b(measure|apply|step)\b", line["Kernel Name"])
        row = found.setdefault(line["ID"], {"case": case, "kernel": kernel[1] if kernel else "?"})
        row[column] = f"{float(value) / numel if factor is None else float(value) * factor:.2f}"
    return list(found.values())


def measure(out: Path, cases: list[Case]) -> int:
    """Count case by case, and write what is known after each; the exit status."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        print("ncu was found neither in PATH nor in /usr/local/cuda/bin")
        return process.SKIPPED
    counted, status = [], 0
    for case in cases:
        log = out / f"counters.{case.model}.txt"
        done = process.run(command(ncu, case), log, LIMIT_S, dict(os.environ))
        said = process.tail(log, 2**20)
        log.unlink()
        found = rows(case, said)
        if not found:
            print(f"{said[-3000:]}\n{case}: ncu {done.words}, and counted nothing", flush=True)
            if "ERR_NVGPUCTRPERM" in said:
                print("this user may not read the counters of this GPU")
                return process.SKIPPED
            status = 1
            continue
        counted += found
        write_csv(out / "counters.csv", counted, every_column(counted))
        write_text(out / "counters.md", plain_table(counted))
    if counted:
        print(plain_table(counted))
    return status


if __name__ == "__main__":
    if len(sys.argv) == 3:
        steps(Case(sys.argv[1], sys.argv[2], "float32"), torch.device("cuda"))
        torch.cuda.synchronize()
    else:
        raise SystemExit(measure(folder(), TARGETS))
