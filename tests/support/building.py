"""Commands that the packaging tests run, without the network and never for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

# cmake and ninja are found beside the interpreter, also where .venv is not active.
SCRIPTS = sysconfig.get_path("scripts")
# Added to the copy of csrc/cuda that is shipped, which so holds something, whatever it holds today.
ADDED = ("csrc/cuda/added.cu", "csrc/cuda/added.cuh", "csrc/cuda/added.h")


def run(
    *command: str | Path, cwd: Path | None = None, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a command prints, on a pytest worker or off it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    kept["PATH"] = os.pathsep.join([SCRIPTS, os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def output(
    *command: str | Path, cwd: Path | None = None, timeout: float = 300, **environment: str
) -> str:
    """What a command prints; it must succeed."""
    done = run(*command, cwd=cwd, timeout=timeout, **environment)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """An sdist or a wheel, built with what is installed here."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir"]
    output(*command, out, source, timeout=1800, FASTLARS_CUDA="0")
    (built,) = out.iterdir()
    return built
