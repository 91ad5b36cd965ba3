"""Runs a script in a folder; its processes die where DEATHS says.

``kill_during_overlap.py SCRIPT FOLDER``.

DEATHS names for each attempt who dies and in which step: "0:7 1:12". Death comes between the steps
of two buckets, in the callback that has written the weights of the first one.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any

from fastlars.backends.cpu import Cpu
from fastlars.optim.base import FusedOptimizer

deaths = [death.split(":") for death in os.environ.get("DEATHS", "").split()]
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank, step = deaths[attempt] if attempt < len(deaths) else ("", "-1")
taken = 0
in_step = False  # else a list is written during backward
original, original_step = Cpu.step, FusedOptimizer.step


def step_or_die(self: Cpu, *arguments: Any) -> Any:
    """A list of tensors is written; it may be the last."""
    result = original(self, *arguments)
    if not in_step and rank == os.environ["RANK"] and taken == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def counted(self: FusedOptimizer, *arguments: Any, **keywords: Any) -> Any:
    """optimizer.step() of this attempt."""
    global taken, in_step
    taken += 1
    in_step = True
    try:
        return original_step(self, *arguments, **keywords)
    finally:
        in_step = False


Cpu.step = step_or_die  # type: ignore[method-assign]
FusedOptimizer.step = counted  # type: ignore[method-assign]
os.chdir(sys.argv[2])
runpy.run_path(sys.argv[1], run_name="__main__")
