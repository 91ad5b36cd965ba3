"""What a run says of itself at its start and at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastlars.trainer import plots, repeat
from fastlars.trainer.config import Config, recipe_of
from fastlars.trainer.errors import printable
from fastlars.trainer.log import read
from fastlars.trainer.loop import Loop
from fastlars.trainer.parts import Parts, fingerprint
from fastlars.trainer.settings import flag

# What lies in a run directory, in the order in which it is listed.
_FILES = {
    "checkpoint": ("checkpoint.pt", "checkpoint-*.pt", "best.pt"),
    "settings": ("run.json",),
    "log": ("metrics.jsonl", "tensorboard"),
    "pictures": ("curves.png", "trust.png", "norms.png"),
    "tables": ("trust.csv", "norms.csv"),
}


def title(parts: Parts) -> str:
    """The run in a few words."""
    config = parts.config
    data = printable(parts.data.name)
    return f"{config.recipe.upper()}, {config.model}, {data}, batch {config.batch_size}"


def images_and_model(parts: Parts) -> Iterator[str]:
    """What is trained."""
    data = parts.data
    size = sum(parameter.numel() for parameter in parts.model.parameters())
    yield (
        f"{title(parts)}: {size / 1e6:.1f}M parameters, {data.train_size} training and "
        f"{data.test_size} test images of {len(data.classes)} classes at {data.image_size} pixels"
    )


def share(parts: Parts) -> str:
    """The weight decay, and where and how a step is taken."""
    config, plan = parts.config, parts.plan
    return (
        f"weight decay {config.weight_decay:g}, on {parts.world.size} x "
        f"{parts.world.device.type}, {plan.micro_batches} x {plan.micro_batch} images a step each"
    )


def introduction(parts: Parts) -> Iterator[str]:
    """What is trained, how, and where the settings come from."""
    config, steps = parts.config, parts.plan.steps_per_epoch
    yield from images_and_model(parts)
    yield f"{config.epochs} epochs of {steps} steps, lr {config.lr:g}, {share(parts)}"
    recipe = recipe_of(config)
    yield f"recipe {config.recipe}: {recipe.source}"
    changed = _changed(config, recipe.settings)
    if changed:
        yield f"instead of the recipe's: {changed}"


# The rate that --find-lr suggests with resnet20, a batch of 256 and CIFAR-10's 32 pixels.
_FOR_SMALL = {"lars": 22.0, "lamb": 0.014, "goyal": 0.77, "mlperf": 3.2}
_FAR = 4.0


def hint(parts: Parts, given: Iterable[str]) -> Iterator[str]:
    """A line where a new run takes a rate that was made for ImageNet and is low for its images.

    Args:
        parts: the run.
        given: names of the settings on the command line.
    """
    config = parts.config
    found = _FOR_SMALL.get(config.recipe, 0.0)
    if "lr" not in given and parts.data.stem == "small" and config.lr * _FAR < found:
        yield (
            f"hint: lr {config.lr:g} comes from rates for ImageNet; for CIFAR-10's 32 pixels "
            f"(resnet20, batch 256) --find-lr suggests {found:g}: try --find-lr, or set --lr"
        )


def _changed(config: Config, settings: dict[str, Any]) -> str:
    """The settings that are not as the recipe has them, by flag, with what it has."""
    return ", ".join(
        f"{flag(name)} {_short(getattr(config, name))} ({_short(value)})"
        for name, value in settings.items()
        if getattr(config, name) != value
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def start_record(parts: Parts) -> dict[str, Any]:
    """The values of the record "start"."""
    config = parts.config
    return {
        "title": title(parts),
        "recipe": recipe_of(config).source,
        "config": config.shaping(),
        "data": fingerprint(parts.data) | {"classes": len(parts.data.classes)},
        "steps_per_epoch": parts.plan.steps_per_epoch,
        "processes": parts.world.size,
        "device": parts.world.device.type,
        "versions": repeat.versions(),
    }


def draw_layers(parts: Parts) -> None:
    """Draw what the records say of layers; where that fails, the run is none the worse."""
    with plots.optional(parts.display.warn):
        plots.draw_layers(read(parts.run.log), parts.run.path)


def conclusion(loop: Loop, stopped_by: str | None, seconds: float) -> Iterator[str]:
    """The result and the files of the run, or how to go on with it."""
    parts, progress = loop.parts, loop.progress
    if stopped_by is not None and not (loop.begun or parts.run.came_from):
        yield f"stopped by {stopped_by} before the first step"
        return
    if stopped_by is not None:
        yield (
            f"stopped by {stopped_by} at step {progress.step} of {loop.total_steps}; go on with: "
            f"python -m fastlars.trainer {_to_resume(parts)}"
        )
        return
    if not parts.world.first:  # only that one has kept records
        return
    tests: list[int] = []
    with suppress(OSError):  # it may have been removed
        tests = [r["images"] for r in read(parts.run.log) if r["kind"] == "test"]
    images = tests[-1] if tests else parts.data.test_size  # a checkpoint may come without its log
    yield (
        f"final test accuracy: {progress.last_accuracy:.2%} "
        f"({round(progress.last_accuracy * images)} of {images}), "
        f"best {progress.best_accuracy:.2%} after epoch {progress.best_epoch}; {seconds:.0f} s"
    )
    yield from _files(parts.run.path)


def _to_resume(parts: Parts) -> str:
    """The arguments that go on with a run as it was, without what the checkpoint has."""
    path = shlex.quote(str(parts.run.checkpoint))
    words = [f"--resume={path}" if path.startswith("-") else f"--resume {path}"]
    left_out = ("data", "output", "max_steps")  # in the checkpoint, next to it, and reached
    for setting in fields(parts.config):
        value = getattr(parts.config, setting.name)
        usual = setting.metadata["shapes_run"] or setting.name in left_out
        if not usual and value != setting.default:
            words.append(flag(setting.name) + ("" if value is True else f" {value}"))
    return " ".join(words)


def _files(folder: Path) -> Iterator[str]:
    """A line for each thing that is there."""
    for what, patterns in _FILES.items():
        label = f"{what}:"
        for path in [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
            yield f"{label:<12}{path}"
            label = ""
