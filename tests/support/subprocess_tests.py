"""Python processes of their own, for what must be decided before fastlars is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from repository_files import ROOT


def python(
    *arguments: str, timeout: float | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What an interpreter prints."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def passing(path: str, *options: str, timeout: float | None = None, **environment: str) -> int:
    """How many tests of a file pass; none may fail."""
    # What compiled code prints before it ends the process must not be held back.
    usual = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys")
    # Threads that spin while they wait would slow down the others.
    waits = {"OMP_WAIT_POLICY": "PASSIVE", **environment}
    done = python(*usual, f"tests/{path}", *options, timeout=timeout, **waits)
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    return int(passed[1])
