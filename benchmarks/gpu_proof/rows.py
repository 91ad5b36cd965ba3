"""The four rows that matter most: ResNet-50 and BERT-large, LARS and LAMB, in float32."""

from __future__ import annotations

import gc
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_proof.stages import folder
from benchmarks.machine import Gpu, Machine, describe
from benchmarks.results import write_csv, write_text
from benchmarks.step import report
from benchmarks.step.cases import TARGETS, Case
from benchmarks.step.comparison import Comparison, Effort, UnavailableError

CASES = [*TARGETS, Case("resnet50", "lamb", "float32"), Case("bert_large", "lars", "float32")]
EFFORT = Effort(rounds=41, limit_s=1.5, host_rounds=31, host_limit_s=0.5)


def is_wanted(name: str) -> bool:
    """fastlars by every path, and torch's fused optimizer."""
    return name.startswith("fastlars") or "(fused)" in name


def tabulated(compared: Comparison, name: str) -> dict[str, Any]:
    """A contender's figures as a row of the table, measured now by what is installed."""
    common = {
        **describe(),
        "group": str(compared.case),
        "version": version(compared.contenders[name].package),
        "python": platform.python_version(),
        "date": f"{date.today()}",
        "commit": os.environ.get("GPU_COMMIT", ""),
    }
    return report.tabulated({**common, **compared.row(name)})


def measure(machine: Machine, out: Path, cases: list[Case], effort: Effort = EFFORT) -> int:
    """Measure case by case, and write what is known after each; the exit status."""
    table, status = [], 0
    for case in cases:
        found = Comparison(case, machine, effort, is_wanted).run()
        for name, error in found.errors.items():
            skipped = isinstance(error, UnavailableError)
            words = "skipped" if skipped else type(error).__name__
            print(f"{case}: {name}: {words}: {error}", flush=True)
            status |= not skipped
        table += [tabulated(found, name) for name in found.figures]
        if table:
            write_csv(out / "rows.csv", table)
            write_text(out / "rows.md", report.markdown(table) + "\n")
        found.calls.clear()
        gc.collect()
        torch.cuda.empty_cache()
    print(report.markdown(table) if table else "no figures")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(measure(Gpu(), folder(), CASES))
