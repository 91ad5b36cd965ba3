"""What the check at first use adds to the first step.

``python -m benchmarks.step.first_step [DEVICE [RULE ...]]``

Every figure is of a process of its own, which has stepped nothing yet; those with and without the
check (``FASTLARS_CHECK=0``) take turns. Prints medians over the processes, in milliseconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks import ROOT, results
from benchmarks.machine import describe
from benchmarks.models import parameters
from benchmarks.step.contenders import RULES

PROCESSES = 3
RULES_TRIED = ("lars", "lamb", "rmsprop")


def first_and_second(rule: str, device: torch.device) -> tuple[float, float]:
    """Milliseconds of the first two steps, with the wait for the device."""
    # Small: what the first step spends on states of ResNet-50 varies by more than the check takes.
    params = parameters([(64,)] * 161, device)
    optimizer = RULES[rule]["fastlars"].build(params)
    taken = []
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        optimizer.step()
        _wait(device)
        taken.append((time.perf_counter() - start) * 1e3)
    return taken[0], taken[1]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measured(rule: str, device: str, check: str) -> list[float]:
    """The same in a new process."""
    code = "import sys; from benchmarks.step import first_step as f; "
    code += "print('steps', *f.first_and_second(sys.argv[1], f.torch.device(sys.argv[2])))"
    here = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, rule, device],
        env={**os.environ, "PYTHONPATH": here, "FASTLARS_CHECK": check},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [float(word) for word in done.stdout.split("steps")[-1].split()]


def main(device: str = "cpu", *rules: str) -> int:
    """Print a table."""
    print(*describe().values(), device, sep=", ")
    lines = []
    for rule in rules or RULES_TRIED:
        runs: dict[str, list[list[float]]] = {"1": [], "0": []}
        for _ in range(PROCESSES):
            for check, found in runs.items():
                found.append(measured(rule, device, check))
        first, without = (statistics.median(run[0] for run in runs[check]) for check in "10")
        second = statistics.median(run[1] for found in runs.values() for run in found)
        lines.append([rule, *(f"{t:.1f}" for t in (first, without, first - without, second))])
    headings = "rule | first step | without the check | difference | second step"
    print(results.markdown(headings, "lr", lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
