"""Two processes of the trainer, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from repository_files import TESTS, python_path
from trainer.helpers import Outcome


def start(*arguments: object, restarts: int = 0, **environment: str) -> subprocess.Popen[str]:
    """Two processes of the trainer with the tiny model."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            f"--max-restarts={restarts}", str(TESTS / "trainer/run_tiny.py"), *map(str, arguments),
        ],
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal can go to all, as from a terminal
    )  # fmt: skip


def finish(started: subprocess.Popen[str]) -> Outcome:
    try:
        out, err = started.communicate(timeout=600)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    return Outcome(started.returncode, out, err)
