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
from fastlars.trainer.config.settings import absolute_data, recipe_of
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import atomic
from fastlars.trainer.output.directory import RunDirectory


def write(
    context: TrainingContext, directory: RunDirectory, command: Sequence[str], step: int
) -> None:
    """Add a start to the run's run.json; a run that goes on keeps those before.

    Args:
        context: what is trained, in all processes.
        directory: where run.json is.
        command: the arguments of the command line.
        step: where the run starts, or goes on.
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
        recipe = recipe_of(context.config).source
        path, before = directory.settings, directory.came_from
        starts = _starts(before.with_name(path.name)) if before else []
        text = json.dumps({"recipe": recipe, "starts": [*starts, start]}, indent=2) + "\n"
        try:
            atomic.write(path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise TrainerError(f"cannot write {path}: {error.strerror}") from None


def started_by(command: Sequence[str], path: Path) -> bool:
    """Whether the last start in the run.json at `path` was by this command line."""
    starts = _starts(path)
    return bool(starts) and starts[-1]["command"][3:] == [*command]


def versions() -> dict[str, str | int | None]:
    """Of everything that numbers may depend on; None for what is not there."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "fastlars": fastlars.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "driver": _driver(),
        "system": platform.platform(),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    """What a process computes with; sums of another number of threads are rounded otherwise."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": gpu or _processor(), "threads": torch.get_num_threads()}


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    found = re.search(r"(\d+\.\d+[.\d]*)", _text("/proc/driver/nvidia/version"))
    return found[1] if found else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system has no such file
        return ""


def _starts(path: Path) -> list[Any]:
    """Those of a run.json; none where it is missing or somebody's edit broke it."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
