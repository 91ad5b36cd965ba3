"""Scripts under torchrun, for tests; foremost the trainer whose processes die when told to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from repository_files import python_path
from trainer.helpers import assert_same, load, records

TRAINER = Path(__file__).parent / "kill_trainer.py"
SETTINGS = (
    "--recipe", "lars", "--epochs", 2, "--batch-size", 64, "--log-every", 1,
    "--checkpoint-every", 5,
)  # fmt: skip
STEPS = 44  # an epoch has 22
TWO = ("--standalone", "--nproc-per-node=2")


def start(
    script: Path,
    *arguments: object,
    launch: Sequence[str],
    log: Path,
    inside: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen[bytes]:
    """torchrun with flags `launch`; all that it and its processes print goes to the file `log`.

    `inside` is a command that runs another one, such as ``ip netns exec``.
    """
    with log.open("ab") as file:
        return subprocess.Popen(
            [*inside, sys.executable, "-m", "torch.distributed.run", *launch, str(script),
             *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"} | environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )  # fmt: skip


def resumed_at(text: str) -> list[int]:
    """The steps at which processes say that they went on.

    Not line by line: torchrun's Python has no buffer, so that between a text and its line's end the
    other process may write.
    """
    return [int(step) for step in re.findall(r"resumed at step (\d+)", text)]


def assert_same_runs(one: Path, other: Path) -> None:
    """Checkpoints and logs equal to the bit."""
    assert_same(load(one), load(other))
    assert records(one) == records(other)


def finish(started: subprocess.Popen[bytes], seconds: float = 600) -> int:
    """The exit status; torchrun and its processes are killed when it takes longer."""
    try:
        return started.wait(timeout=seconds)
    finally:
        stop(started)


def stop(started: subprocess.Popen[bytes]) -> None:
    """Kill torchrun, if it still runs, and its processes."""
    if started.poll() is None:
        started.terminate()  # torchrun passes it on to processes, which have their own sessions
        try:
            started.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
