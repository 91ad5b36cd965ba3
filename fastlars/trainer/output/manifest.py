"""run.json: everything that is needed to repeat a run, for each of its starts."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision

import fastlars
from fastlars.trainer.config.settings import absolute_data
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import atomic
from fastlars.trainer.output.directory import RunDirectory


def write(
    context: TrainingContext, directory: RunDirectory, command: Sequence[str], step: int
) -> None:
    """Add a start at `step` to the run's run.json; a resumed run keeps the earlier ones.

    Every process takes part: each adds its machine.
    """
    with context.world.raise_on_all_ranks():
        machines = context.world.gather(_machine(context.world.device))
        if not context.world.first:
            return
        start = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": ["python", "-m", "fastlars.trainer", *command],
            "step": step,
            "processes": context.world.size,
            "machines": machines,
            "versions": versions(),
            "config": asdict(context.config) | {"data": absolute_data(context.config.data)},
        }
        path, before = directory.settings, directory.came_from
        starts = [*(_starts(before.with_name(path.name)) if before else []), start]
        content = {"recipe": context.recipe.source, "starts": starts}
        text = json.dumps(content, indent=2) + "\n"
        try:
            atomic.write(path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise TrainerError(f"cannot write {path}: {error.strerror}") from None


def started_by(command: Sequence[str], path: Path) -> bool:
    """Return whether the last start in the run.json at `path` was by this command line."""
    starts = _starts(path)
    return bool(starts) and starts[-1]["command"][3:] == [*command]


def versions() -> dict[str, str | int | None]:
    """Return the versions of all software that affects results; None for what is not there."""
    return {
        "fastlars": fastlars.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": _found(r"(\d+\.\d+[.\d]*)", "/proc/driver/nvidia/version"),
        "system": platform.platform(),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    """Return what a process computes with: another number of threads rounds sums differently."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    processor = _found(r"^model name\s*: (.*)$", "/proc/cpuinfo") or platform.processor()
    return {"device": gpu or processor or platform.machine(), "threads": torch.get_num_threads()}


def _found(pattern: str, path: str) -> str | None:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system has no such file
        return None
    found = re.search(pattern, text, re.MULTILINE)
    return found and found[1]


def _starts(path: Path) -> list[Any]:
    """Return the starts in a run.json; none if it is missing or somebody's edit broke it."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
