"""What a run says of itself at its start and at its end."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from typing import Any

from fastlars.trainer.config.settings import fixed_on_resume, flag
from fastlars.trainer.errors import printable
from fastlars.trainer.model.context import TrainingContext, fingerprint
from fastlars.trainer.output import manifest
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.records import read

_LABEL = 10  # characters
_WIDEST = 100  # characters: longer lines are hard to read

# What may lie in a run directory, in the order in which it is listed.
FILES = {
    "checkpoint.pt": "the latest state; --resume goes on from it",
    "checkpoint-*.pt": "the state after that step (--keep-last)",
    "best.pt": "the state of the highest test accuracy",
    "run.json": "command, settings, versions and machines of every start",
    "metrics.jsonl": "every figure of the run, one JSON record a line",
    "tensorboard": "event files: tensorboard --logdir",
    "curves.png": "loss, accuracy, learning rate, trust ratios by epoch",
    "trust.png": "trust ratio of every layer over the run",
    "trust.csv": "the trust ratios as a table",
    "norms.png": "norms of every layer's weights and gradient",
    "norms.csv": "the norms as a table",
}


def fact(label: str, text: str) -> Iterator[str]:
    """A label and its text, in lines that fit the terminal."""
    width = min(max(shutil.get_terminal_size().columns, 60), _WIDEST)
    first, rest = f"{label:<{_LABEL}}", " " * _LABEL
    # Paths and flags stay in one piece.
    yield from textwrap.wrap(
        printable(text),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def title(context: TrainingContext) -> str:
    """The run in a few words."""
    config = context.config
    data = printable(context.data.name)
    return f"{config.recipe.upper()}, {config.model}, {data}, batch {config.batch_size}"


def subject(context: TrainingContext) -> Iterator[str]:
    """What is trained, on what."""
    data, side = context.data, context.data.image_size
    size = sum(parameter.numel() for parameter in context.model.parameters())
    yield from fact("model", f"{context.config.model}, {size / 1e6:.1f}M parameters")
    yield from fact(
        "images",
        f"{data.name}: {data.train_size:,} to train, {data.test_size:,} to test, "
        f"{len(data.classes)} classes, {side} x {side} pixels",
    )


def batch(context: TrainingContext) -> str:
    """How the images of a step are divided, and where it is computed."""
    order, world = context.order, context.world
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    passes = f"{order.micro_batches} x " if order.micro_batches > 1 else ""
    shares = f", {passes}{order.micro_batch} images each" if passes or world.size > 1 else ""
    return (
        f"{context.config.batch_size} images; {processes} on {world.device.type}{shares}, "
        f"{context.precision.name}"
    )


def introduction(context: TrainingContext) -> Iterator[str]:
    """What is trained, how, and where the settings come from."""
    config, steps = context.config, context.order.steps_per_epoch
    recipe = context.recipe
    yield title(context)
    yield from subject(context)
    yield from fact("recipe", f"{config.recipe}: {recipe.source}")
    changed = [
        f"{flag(name)} {_short(getattr(config, name))} (recipe: {_short(value)})"
        for name, value in recipe.settings.items()
        if getattr(config, name) != value
    ]
    if changed:
        yield from fact("changed", ", ".join(changed))
    yield from fact("steps", f"{config.epochs} epochs of {steps} steps of {batch(context)}")
    epochs, warmup = config.warmup_epochs, ""
    if epochs:
        unit = "epoch" if epochs == 1 else "epochs"
        warmup = f"{epochs:g} {unit} of warm-up from {config.warmup_from:g}, then "
    rate = f"{warmup}lr {config.lr:g}, schedule {config.schedule}"
    yield from fact("rate", f"{rate}; weight decay {config.weight_decay:g}")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def start_record(context: TrainingContext) -> dict[str, Any]:
    """The values of the record "start"."""
    config = context.config
    return {
        "title": title(context),
        "recipe": context.recipe.source,
        "config": config.shaping(),
        "data": fingerprint(context.data) | {"classes": len(context.data.classes)},
        "steps_per_epoch": context.order.steps_per_epoch,
        "processes": context.world.size,
        "device": context.world.device.type,
        "versions": manifest.versions(),
    }


def stopped(
    context: TrainingContext, directory: RunDirectory, stopped_by: str, *, started: bool
) -> str:
    """Where a run stopped, and the command that resumes it."""
    if not (started or directory.came_from):
        return f"stopped by {stopped_by} before the first step"
    path = shlex.quote(str(directory.checkpoint))
    words = [f"--resume={path}" if path.startswith("-") else f"--resume {path}"]
    left_out = ("data", "output", "max_steps")  # in the checkpoint, next to it, and reached
    for setting in fields(context.config):
        value = getattr(context.config, setting.name)
        usual = fixed_on_resume(setting.name) or setting.name in left_out
        if not usual and value != setting.default:
            words.append(flag(setting.name) + ("" if value is True else f" {value}"))
    start = "python" if context.world.size == 1 else "torchrun ..."
    return (
        f"stopped by {stopped_by} at step {context.progress.step} of {context.total_steps}; go on "
        f"with: {start} -m fastlars.trainer {' '.join(words)}"
    )


def conclusion(context: TrainingContext, directory: RunDirectory, seconds: float) -> Iterator[str]:
    """The result and the files of a run that reached its end."""
    progress = context.progress
    tested = [context.data.test_size]  # where a checkpoint comes without its log
    with suppress(OSError):  # it may have been removed
        tested += [r["images"] for r in read(directory.log) if r["kind"] == "test"]
    yield ""
    yield (
        f"final test accuracy: {progress.last_accuracy:.2%} "
        f"({round(progress.last_accuracy * tested[-1])} of {tested[-1]}), "
        f"best {progress.best_accuracy:.2%} after epoch {progress.best_epoch}; {seconds:.0f} s"
    )
    yield f"files in {printable(str(directory.path))}:"
    for pattern, purpose in FILES.items():
        for path in sorted(directory.path.glob(pattern)):
            yield f"  {path.name:<22}{purpose}"
