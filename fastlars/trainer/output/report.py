"""What a run says of itself at its start and at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastlars.trainer.config.settings import Config, flag, recipe_of
from fastlars.trainer.errors import printable
from fastlars.trainer.model.context import TrainingContext, fingerprint
from fastlars.trainer.output import manifest, pictures
from fastlars.trainer.output.records import read
from fastlars.trainer.run.loop import Loop

# What lies in a run directory, in the order in which it is listed.
_FILES = {
    "checkpoint": ("checkpoint.pt", "checkpoint-*.pt", "best.pt"),
    "settings": ("run.json",),
    "log": ("metrics.jsonl", "tensorboard"),
    "pictures": ("curves.png", "trust.png", "norms.png"),
    "tables": ("trust.csv", "norms.csv"),
}


def title(context: TrainingContext) -> str:
    """The run in a few words."""
    config = context.config
    data = printable(context.data.name)
    return f"{config.recipe.upper()}, {config.model}, {data}, batch {config.batch_size}"


def images_and_model(context: TrainingContext) -> Iterator[str]:
    """What is trained."""
    data = context.data
    size = sum(parameter.numel() for parameter in context.model.parameters())
    yield (
        f"{title(context)}: {size / 1e6:.1f}M parameters, {data.train_size} training and "
        f"{data.test_size} test images of {len(data.classes)} classes at {data.image_size} pixels"
    )


def share(context: TrainingContext) -> str:
    """The weight decay, and where and how a step is taken."""
    config, order = context.config, context.order
    return (
        f"weight decay {config.weight_decay:g}, on {context.world.size} x "
        f"{context.world.device.type}, {order.micro_batches} x {order.micro_batch} images a step "
        "each"
    )


def introduction(context: TrainingContext) -> Iterator[str]:
    """What is trained, how, and where the settings come from."""
    config, steps = context.config, context.order.steps_per_epoch
    yield from images_and_model(context)
    yield f"{config.epochs} epochs of {steps} steps, lr {config.lr:g}, {share(context)}"
    recipe = recipe_of(config)
    yield f"recipe {config.recipe}: {recipe.source}"
    changed = _changed(config, recipe.settings)
    if changed:
        yield f"instead of the recipe's: {changed}"


# The rate that --find-lr suggests with resnet20, a batch of 256 and CIFAR-10's 32 pixels.
_FOR_SMALL = {"lars": 22.0, "lamb": 0.014, "goyal": 0.77, "mlperf": 3.2}
_FAR = 4.0


def hint(context: TrainingContext, given: Iterable[str]) -> Iterator[str]:
    """A line where a new run takes a rate that was made for ImageNet and is low for its images.

    Args:
        context: the run.
        given: names of the settings on the command line.
    """
    config = context.config
    found = _FOR_SMALL.get(config.recipe, 0.0)
    if "lr" not in given and context.data.stem == "small" and config.lr * _FAR < found:
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


def start_record(context: TrainingContext) -> dict[str, Any]:
    """The values of the record "start"."""
    config = context.config
    return {
        "title": title(context),
        "recipe": recipe_of(config).source,
        "config": config.shaping(),
        "data": fingerprint(context.data) | {"classes": len(context.data.classes)},
        "steps_per_epoch": context.order.steps_per_epoch,
        "processes": context.world.size,
        "device": context.world.device.type,
        "versions": manifest.versions(),
    }


def draw_layers(context: TrainingContext) -> None:
    """Draw what the records say of layers; where that fails, the run is none the worse."""
    with pictures.optional(context.display.warn):
        pictures.draw_layers(read(context.run.log), context.run.path)


def conclusion(loop: Loop, stopped_by: str | None, seconds: float) -> Iterator[str]:
    """The result and the files of the run, or how to go on with it."""
    context, progress = loop.context, loop.progress
    if stopped_by is not None and not (loop.begun or context.run.came_from):
        yield f"stopped by {stopped_by} before the first step"
        return
    if stopped_by is not None:
        yield (
            f"stopped by {stopped_by} at step {progress.step} of {loop.total_steps}; go on with: "
            f"python -m fastlars.trainer {_to_resume(context)}"
        )
        return
    if not context.world.first:  # only that one has kept records
        return
    tests: list[int] = []
    with suppress(OSError):  # it may have been removed
        tests = [r["images"] for r in read(context.run.log) if r["kind"] == "test"]
    images = tests[-1] if tests else context.data.test_size  # a checkpoint may come without its log
    yield (
        f"final test accuracy: {progress.last_accuracy:.2%} "
        f"({round(progress.last_accuracy * images)} of {images}), "
        f"best {progress.best_accuracy:.2%} after epoch {progress.best_epoch}; {seconds:.0f} s"
    )
    yield from _files(context.run.path)


def _to_resume(context: TrainingContext) -> str:
    """The arguments that go on with a run as it was, without what the checkpoint has."""
    path = shlex.quote(str(context.run.checkpoint))
    words = [f"--resume={path}" if path.startswith("-") else f"--resume {path}"]
    left_out = ("data", "output", "max_steps")  # in the checkpoint, next to it, and reached
    for setting in fields(context.config):
        value = getattr(context.config, setting.name)
        usual = setting.metadata["fixed_on_resume"] or setting.name in left_out
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
