"""``python -m fastlars check``: checks every back end against the reference on every device here.

Each back end runs in a process of its own: if it crashes or hangs, the others are still checked.
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
from fastlars.backends.selfcheck import Combination, combination, difference
from fastlars.rules import RULES, Rule

LIMIT_S = 25.0  # for the whole command, without the start of Python
SILENCE_LIMIT_S = 15.0  # for one combination, including the start of its device
MAX_CRASHES = 3  # after so many crashed or hung processes, a back end is given up
MAX_SHOWN = 5  # errors that are printed for one back end
DEFAULT_RULES = [rule_class.usual() for rule_class in RULES]
CHECKED: dict[str, tuple[Rule, ...]] = {
    rule.title: (rule, replace(rule, adapt=False)) if rule.adapt else (rule,)
    for rule in DEFAULT_RULES
}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPE_MIXES = (
    *(Dtypes(w, g, s) for w, g, s in product((F32, BF16, F16), (F32, BF16, F16), (F32, BF16))),
    *(Dtypes(F32, g, s, copy=c) for g, s, c in product((F32, BF16, F16), (F32, BF16), (BF16, F16))),
)
# Each type for weights, gradients, states and copies once or more. Triton compiles kernels anew for
# each mix: all mixes would take it a minute.
SOME_TYPE_MIXES = (
    Dtypes(F32, F32, F32),
    Dtypes(BF16, BF16, F32),
    Dtypes(F16, F16, BF16),
    Dtypes(F32, BF16, F32, copy=BF16),
    Dtypes(F32, F16, BF16, copy=F16),
)


def combinations(backend: str) -> list[tuple[str, Combination]]:
    """All combinations that are checked of a back end, each with its rule's title."""
    found = []
    for title, rules in CHECKED.items():
        pairs = [*product(rules, TYPE_MIXES)]
        if backend == "triton":
            pairs = [*product(rules[:1], SOME_TYPE_MIXES), *product(rules[1:], SOME_TYPE_MIXES[:1])]
        for rule, dtypes in pairs:
            found.append((title, combination(rule, dtypes)))
            if dtypes.weight == BF16:
                found.append((title, combination(rule, dtypes, rounds=True)))
    return found


@dataclass
class Trial:
    """The check of one back end on one device.

    Attributes:
        path: launch path of the CUDA back end; empty for the others.
        absent: why the back end cannot serve the device; empty if it can.
        results: for each combination that was reached, what is wrong with it: "" if nothing is.
    """

    backend: str
    path: str
    device: torch.device
    absent: str = ""
    results: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.combinations = combinations(self.backend)

    @property
    def name(self) -> str:
        return f"{self.backend} {self.path}".strip()

    @property
    def wrong(self) -> list[str]:
        pairs = zip(self.combinations, self.results, strict=False)
        return [f"{tested}: {text}" for (_, tested), text in pairs if text]

    @property
    def is_right(self) -> bool:
        """Whether something was checked, and nothing is wrong so far."""
        return bool(self.results) and not self.wrong

    def cell(self, title: str) -> str:
        """How many combinations of a rule are right, as a cell of the table."""
        of_rule = [i for i, (name, _) in enumerate(self.combinations) if name == title]
        reached = [self.results[i] for i in of_rule if i < len(self.results)]
        right, left = reached.count(""), len(of_rule) - len(reached)
        words = [f"{right} of {len(of_rule)}"]
        words += [f"{len(reached) - right} WRONG"] * (right < len(reached))
        return ", ".join(words + [f"{left} not reached"] * (left > 0))


def devices() -> list[torch.device]:
    """The CPU, and all devices of the accelerator that torch finds."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        count = torch.accelerator.device_count()
        found += [torch.device(accelerator.type, i) for i in range(count)]
    return found


def trials() -> list[Trial]:
    """One trial for each device, each back end for this type of device, and each launch path."""
    found = []
    for device in devices():
        weight = torch.empty(1, device=device)
        for backend in choose.COMPILED.get(device.type, ("triton",)):
            absent = choose.why_not(backend, weight, TYPE_MIXES[0])
            for path in cuda.PATHS if backend == "cuda" and not absent else ("",):
                found.append(Trial(backend, path, device, absent))
    return found


def command(trial: Trial, results: str) -> list[str]:
    """The command that checks the rest of a trial, and appends what it finds to the file
    ``results``."""
    module = (sys.executable, "-m", "fastlars.check")
    return [*module, trial.backend, str(trial.device), str(len(trial.results)), results]


def run(trial: Trial, end: float) -> None:
    """Check all combinations, until ``end`` on the monotonic clock. If a process crashes or hangs,
    its current combination is wrong, and a new process continues with the next one."""
    crashes = 0
    while (
        len(trial.results) < len(trial.combinations)
        and time.monotonic() < end
        and crashes < MAX_CRASHES
    ):
        with tempfile.TemporaryDirectory(prefix="fastlars-") as folder:
            wrong = _run_process(trial, Path(folder), end)
        if wrong:
            trial.results.append(wrong)
            crashes += 1
    if not trial.results:
        trial.results.append(f"nothing was known after {LIMIT_S:.0f} s")


def _run_process(trial: Trial, folder: Path, end: float) -> str:
    """Collect the results of one process. Returns how it crashed or hung; empty if it did not."""
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
    # SILENCE_LIMIT_S counts from when the process opens its results: its imports may be slow while
    # other processes run, which is not the fault of a combination.
    first, last_result = len(trial.results), math.inf
    try:
        while True:
            ended = process.poll() is not None  # before reading: the last results are not missed
            *lines, _ = results.read_text().split("\n") if results.exists() else [""]
            new = lines[len(trial.results) - first :]
            trial.results += new
            if new or (last_result == math.inf and results.exists()):
                last_result = time.monotonic()
            if len(trial.results) == len(trial.combinations) or time.monotonic() > end:
                return ""
            if ended:
                said = output.read_text(errors="replace").strip().splitlines() or ["without a word"]
                return f"the process ended with status {process.returncode}: {said[-1]}"
            if time.monotonic() > last_result + SILENCE_LIMIT_S:
                return f"took longer than {SILENCE_LIMIT_S:.0f} s"
            time.sleep(0.02)
    finally:
        # The whole session: the process may have started others, such as Triton's compilers.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that is blocked in a driver may not end at once.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)


def check_from(backend: str, device: str, first: int, results: str) -> None:
    """Check combinations from number ``first`` on, and append a line for each to the file
    ``results``: what is wrong, or nothing. Runs in a process of its own."""
    with open(results, "a") as out:
        for _, tested in combinations(backend)[first:]:
            text = difference(choose.instance(backend), tested, torch.device(device))
            print(" ".join(text.split()), file=out, flush=True)


def table(trials: list[Trial]) -> list[str]:
    """The lines of the table: a row for each trial, a column for each rule."""
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
    """For each device on which something is wrong, the environment variables to set."""
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
    """Check all back ends. Returns 1 if one differs from the reference, crashes or hangs."""
    start = time.monotonic()
    every = trials()
    present = [trial for trial in every if not trial.absent]
    # All at the same time: one that starts only shortly before the end could hang unnoticed.
    with ThreadPoolExecutor(len(present)) as pool:
        list(pool.map(lambda trial: run(trial, start + LIMIT_S), present))
    print(*table(every), sep="\n")
    for trial in present:
        if trial.wrong:
            print(f"\n{trial.name} on {trial.device}:", *trial.wrong[:MAX_SHOWN], sep="\n  ")
        if len(trial.wrong) > MAX_SHOWN:
            print(f"  and {len(trial.wrong) - MAX_SHOWN} more")
    wrong = sum(len(trial.wrong) for trial in present)
    known = sum(len(trial.results) for trial in present)
    left = sum(len(trial.combinations) for trial in present) - known
    print(f"\n{known - wrong} of {known} combinations of rule and types agree with the reference.")
    if left:
        print(f"{left} more were not reached in {LIMIT_S:.0f} s; what Triton has compiled is kept")
        print("for the next call of this command.")
    print(f"{time.monotonic() - start:.1f} s", *advice(every), sep="\n")
    return int(wrong > 0)


if __name__ == "__main__":
    check_from(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
