"""The trainer as torchrun starts it, with the tiny model. Its processes die where DEATHS says.

DEATHS names for each attempt who dies, where and in which step: "0:backward:25 1:optimizer:36".
SECONDS makes every step last so long, for tests that must meet one under way.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from fastlars.backends.cpu import Cpu
from fastlars.trainer.__main__ import main
from fastlars.trainer.model import resnet
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import pictures
from fastlars.trainer.run import loop
from trainer.helpers import UNDRAWN, tiny_net


def die(*_: object) -> None:
    """As the system ends a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, and then death."""

    def last(*arguments: Any, **keywords: Any) -> None:
        function(*arguments, **keywords)
        die()

    return last


def arm(context: TrainingContext, where: str) -> None:
    """Let this process die in the step that comes next."""
    if where == "backward":  # the last gradient: others are ready, and travel already
        next(context.model.parameters()).register_hook(die)
    elif where == "optimizer":  # the weights of the first list are written, the others not
        Cpu.step = after(Cpu.step)  # type: ignore[method-assign]
    else:  # the new checkpoint lies on the disk, under a name of its own
        os.replace = die  # type: ignore[assignment]


deaths = [death.split(":") for death in os.environ.get("DEATHS", "").split()]
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank, place, step = deaths[attempt] if attempt < len(deaths) else ("", "", "-1")
seconds = float(os.environ.get("SECONDS", "0"))
original = loop.step


def step_or_die(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
    """A step, and whatever is to happen in it."""
    if rank == os.environ["RANK"] and context.progress.step == int(step):
        arm(context, place)
    time.sleep(seconds)
    return original(context, *arguments, **options)


resnet.build = tiny_net
for name, undrawn in UNDRAWN.items():
    setattr(pictures, name, undrawn)
loop.step = step_or_die  # type: ignore[method-assign]
sys.exit(main())
