"""``python -m fastlars check``: every back end against the reference on the devices that are here.

Each back end is tried in a process of its own: one that ends its process, or never comes back,
takes nothing from the others.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch

from fastlars.backends import choose, cuda
from fastlars.backends.base import Dtypes
from fastlars.backends.selfcheck import Family, difference, family
from fastlars.rules import RULES, Rule

LIMIT_S = 25.0  # of the whole command, less the start of Python
SHOWN = 5  # of what is wrong with a back end
DEATHS = 3  # of processes of one back end, after which it is given up
PATIENCE_S = 15.0  # for one family, the start of its device included
USUAL = [kind.usual() for kind in RULES]
CHECKED: dict[str, tuple[Rule, ...]] = {
    rule.title: (rule, replace(rule, adapt=False)) if rule.adapt else (rule,) for rule in USUAL
}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPE_MIXES = (
    *(Dtypes(w, g, s) for w, g, s in product((F32, BF16, F16), (F32, BF16, F16), (F32, BF16))),
    *(Dtypes(F32, g, s, copy=c) for g, s, c in product((F32, BF16, F16), (F32, BF16), (BF16, F16))),
)
# Each type in each place. Triton compiles every list of types anew, all of them for a minute.
SOME_TYPE_MIXES = (
    Dtypes(F32, F32, F32),
    Dtypes(BF16, BF16, F32),
    Dtypes(F16, F16, BF16),
    Dtypes(F32, BF16, F32, copy=BF16),
    Dtypes(F32, F16, BF16, copy=F16),
)


def families(backend: str) -> list[tuple[str, Family]]:
    """What is checked of a back end, by the rule's name."""
    found = []
    for name, rules in CHECKED.items():
        pairs = [*product(rules, TYPE_MIXES)]
        if backend == "triton":
            pairs = [*product(rules[:1], SOME_TYPE_MIXES), *product(rules[1:], SOME_TYPE_MIXES[:1])]
        for rule, dtypes in pairs:
            found.append((name, family(rule, dtypes)))
            if dtypes.weight == BF16:
                found.append((name, family(rule, dtypes, rounds=True)))
    return found


@dataclass
class Trial:
    """One back end on one device.

    Attributes:
        path: how the CUDA back end launches its kernels; empty for the others.
        absent: why the back end does not serve the device; empty where it does.
        found: what is wrong, family by family as far as they were reached; empty where right.
    """

    backend: str
    path: str
    device: torch.device
    absent: str = ""
    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.families = families(self.backend)

    @property
    def name(self) -> str:
        return f"{self.backend} {self.path}".strip()

    @property
    def wrong(self) -> list[str]:
        pairs = zip(self.families, self.found, strict=False)
        return [f"{checked}: {text}" for (_, checked), text in pairs if text]

    @property
    def is_right(self) -> bool:
        """As far as is known."""
        return bool(self.found) and not self.wrong

    def cell(self, rule: str) -> str:
        """How many families of a rule are right, in words."""
        of_rule = [i for i, (name, _) in enumerate(self.families) if name == rule]
        reached = [self.found[i] for i in of_rule if i < len(self.found)]
        right, left = reached.count(""), len(of_rule) - len(reached)
        words = [f"{right} of {len(of_rule)}"]
        words += [f"{len(reached) - right} WRONG"] * (right < len(reached))
        return ", ".join(words + [f"{left} not reached"] * (left > 0))


def devices() -> list[torch.device]:
    """The CPU, and the devices of the accelerator that torch has found."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if kind is not None else 0
    there = [torch.device(kind.type, i) for i in range(count)] if kind is not None else []
    return [torch.device("cpu"), *there]


def trials() -> list[Trial]:
    """Every back end that may serve a device that is here, path by path."""
    found = []
    for device in devices():
        weight = torch.empty(1, device=device)
        for backend in choose.COMPILED.get(device.type, ("triton",)):
            absent = choose.why_not(backend, weight, TYPE_MIXES[0])
            for path in cuda.PATHS if backend == "cuda" and not absent else ("",):
                found.append(Trial(backend, path, device, absent))
    return found


def command(trial: Trial, results: str) -> list[str]:
    """The process that goes on with a trial, and writes what it finds to ``results``."""
    module = (sys.executable, "-m", "fastlars.check")
    return [*module, trial.backend, str(trial.device), str(len(trial.found)), results]


def run(trial: Trial, end: float) -> None:
    """Check family after family. A process that ends, or is silent for too long, costs the family
    that it was at; another process goes on with the next one."""
    deaths = 0
    while len(trial.found) < len(trial.families) and time.monotonic() < end and deaths < DEATHS:
        with tempfile.TemporaryDirectory(prefix="fastlars-") as folder:
            wrong = _follow(trial, Path(folder), end)
        if wrong:
            trial.found.append(wrong)
            deaths += 1
    if not trial.found:
        trial.found.append(f"nothing was known after {LIMIT_S:.0f} s")


def _follow(trial: Trial, folder: Path, end: float) -> str:
    """Take in what one process finds; how it failed to go on, empty where it did not."""
    results, output = folder / "results", folder / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            command(trial, str(results)),
            env={**os.environ, "FASTLARS_CUDA_PATH": trial.path},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Its start, with its imports, may take a while next to others, and is no family's fault.
    first, heard = len(trial.found), math.inf
    try:
        while True:
            ended = process.poll() is not None  # before the last look at the results
            *whole, _ = results.read_text().split("\n") if results.exists() else [""]
            new = whole[len(trial.found) - first :]
            trial.found += new
            if new or (heard == math.inf and results.exists()):
                heard = time.monotonic()
            if len(trial.found) == len(trial.families) or time.monotonic() > end:
                return ""
            if ended:
                said = output.read_text(errors="replace").strip().splitlines() or ["without a word"]
                return f"the process ended with status {process.returncode}: {said[-1]}"
            if time.monotonic() > heard + PATIENCE_S:
                return f"took longer than {PATIENCE_S:.0f} s"
            time.sleep(0.02)
    finally:
        # With all that it has started, such as Triton's compilers.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # One that waits inside of a driver may take its time.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)


def check_from(backend: str, device: str, first: int, results: str) -> None:
    """In a process of its own: note what is wrong, a line for every family."""
    with open(results, "a") as out:
        for _, checked in families(backend)[first:]:
            text = difference(choose.instance(backend), checked, torch.device(device))
            print(" ".join(text.split()), file=out, flush=True)


def table(trials: list[Trial]) -> list[str]:
    """A row for every back end on every device."""
    rows = [["back end", "device", *CHECKED]]
    for trial in trials:
        cells = [f"not here: {trial.absent}"] if trial.absent else map(trial.cell, CHECKED)
        rows.append([trial.name, str(trial.device), *cells])
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


def advice(trials: list[Trial]) -> list[str]:
    """For every device on which something is wrong, what to set."""
    lines = []
    for device in dict.fromkeys(trial.device for trial in trials):
        here = [trial for trial in trials if trial.device == device]
        if not any(trial.wrong for trial in here):
            continue
        right = next((trial for trial in here if trial.is_right), None)
        setting = f"FASTLARS_BACKEND={right.backend}" if right else "FASTLARS_BACKEND=reference"
        if right is not None and right.path:
            setting += f" FASTLARS_CUDA_PATH={right.path}"
        lines.append(f"{device}: set {setting}")
    return lines


def main() -> int:
    """Check all; 0, or 1 where a back end differs from the reference, ends its process or hangs."""
    start = time.monotonic()
    every = trials()
    present = [trial for trial in every if not trial.absent]
    # All at once: one that starts late could hide that it hangs.
    with ThreadPoolExecutor(len(present)) as pool:
        list(pool.map(lambda trial: run(trial, start + LIMIT_S), present))
    print(*table(every), sep="\n")
    for trial in present:
        if trial.wrong:
            print(f"\n{trial.name} on {trial.device}:", *trial.wrong[:SHOWN], sep="\n  ")
        if len(trial.wrong) > SHOWN:
            print(f"  and {len(trial.wrong) - SHOWN} more")
    wrong = sum(len(trial.wrong) for trial in present)
    known = sum(len(trial.found) for trial in present)
    left = sum(len(trial.families) for trial in present) - known
    print(f"\n{known - wrong} of {known} combinations of rule and types agree with the reference.")
    if left:
        print(f"{left} more were not reached in {LIMIT_S:.0f} s; what Triton has compiled is kept")
        print("for the next call of this command.")
    print(f"{time.monotonic() - start:.1f} s", *advice(every), sep="\n")
    return int(wrong > 0)


if __name__ == "__main__":
    check_from(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
