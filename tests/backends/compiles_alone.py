"""Compiles a small kernel of Triton's for sm_90, run by itself by test_triton_compile_lock.py.

Arguments: how to take the lock ("alone", "without", or seconds to hold it for), and a folder, in
which the file "go" lets the processes start together. Prints how many kernels were compiled, and
the seconds that it took.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import triton

from benchmarks.step.triton_kernels import KERNELS, TARGETS, compiled
from fastlars.backends.triton.compile_lock import alone

how, folder = sys.argv[1], Path(sys.argv[2])
names = sys.argv[3:]
assert set(names) <= set(KERNELS)
made: list[str] = []


def note(*, src: Any, cache_hit: bool, **given: Any) -> None:
    if not cache_hit:
        made.append(src.name)


triton.knobs.compilation.listener = note
Path(folder, f"ready-{how}-{time.time_ns()}").touch()
while not Path(folder, "go").exists():
    time.sleep(0.01)
begin = time.perf_counter()
for name in names:
    with contextlib.nullcontext() if how == "without" else alone(name):
        Path(folder, f"entered-{how}").touch()
        compiled(name, TARGETS["sm_90"])
        if how not in ("alone", "without"):
            Path(folder, "held").touch()
            time.sleep(float(how))
print(len(made), time.perf_counter() - begin)
