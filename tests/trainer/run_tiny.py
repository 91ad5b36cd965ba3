"""The trainer with the tiny model and no picture, as torchrun starts it.

With DIE_AT, process 1 of the first attempt is killed at that step, as the system kills one that
takes too much memory, or gets the signal that DIE_BY names. With FULL, no checkpoint finds room.
With ELSEWHERE, process 1 works in that folder.
Several command lines, with "then" between them, run one after the other:
starting processes takes longer than training.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from fastlars.trainer.__main__ import main
from fastlars.trainer.model import resnet
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import checkpoint, pictures
from fastlars.trainer.run import loop
from trainer.helpers import UNDRAWN, tiny_net

resnet.build = tiny_net
for name, undrawn in UNDRAWN.items():
    setattr(pictures, name, undrawn)
step = loop.step


def step_or_die(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
    """A step that the process does not survive, once."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and context.progress.step == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.Signals[os.environ.get("DIE_BY", "SIGKILL")])
    return step(context, *arguments, **options)


def full(path: Path, _state: dict[str, Any]) -> None:
    """A disk without room."""
    raise checkpoint.NotSavedError(f"cannot write {path}: No space left on device")


if "DIE_AT" in os.environ:
    loop.step = step_or_die  # type: ignore[assignment]
if "ELSEWHERE" in os.environ and os.environ["RANK"] == "1":
    os.chdir(os.environ["ELSEWHERE"])
if "FULL" in os.environ:
    checkpoint.save = full
status, line = 0, sys.argv[1:]
while line and status == 0:
    end = line.index("then") if "then" in line else len(line)
    status, line = main(line[:end]), line[end + 1 :]
sys.exit(status)
