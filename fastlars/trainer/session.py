"""One run from its command line to its last line of output."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision

from fastlars.trainer import batchnorm, checkpoint, config, data, model, optimizer, plan, rundir
from fastlars.trainer.config import Command, Config
from fastlars.trainer.data import Data
from fastlars.trainer.distributed import World, restarted, world
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.log import Display, Records
from fastlars.trainer.loop import Loop
from fastlars.trainer.parts import Parts, Progress, fingerprint
from fastlars.trainer.rundir import RunDirectory
from fastlars.trainer.signals import StopSignals


def run(command: Command) -> int:
    """Train as the command line says; the process's exit status."""
    given, resume = command.given, command.resume
    device, timeout = given.get("device", Config.device), given.get("timeout", Config.timeout)
    with world(device, timeout) as here:
        started, again = time.perf_counter(), restarted(here)
        with here.together():
            source = rundir.to_resume(resume, given.get("output", ""), again)
            state = checkpoint.load(source) if source else None
            settings = (
                config.resumed(given, state["config"], str(source))
                if state
                else config.fresh(given)
            )
            images = data.load(settings, here.device)
            _same_images(images, state)
            directory = _directory(settings, source, here)
        with _directory_for(directory, here), StopSignals() as stop:
            loop = _loop(settings, images, directory, state, here)
            with _records(loop, source, state), loop.parts.display, here.connected():
                _introduce(loop, state)
                finished = loop.run(stop)
                _end(loop, finished, stop)
        _conclude(loop, finished, stop, time.perf_counter() - started)
        if finished or stop.received is None:
            return 0
        return 128 + stop.received


def _same_images(images: Data, state: dict[str, Any] | None) -> None:
    if state is None:
        return
    for what, now in fingerprint(images).items():
        before = state["data"][what]
        if now != before:
            raise TrainerError(
                f"--data: {images.name} differs from the images the run was started with: "
                f"{what} is {_short(now)}, was {_short(before)}"
            )


def _short(value: Any) -> str:
    return f"{len(value)} classes from {value[0]}" if isinstance(value, list) else str(value)


def _directory(settings: Config, source: Path | None, here: World) -> RunDirectory:
    """The run's directory, chosen by the first process for all."""
    if source is None:
        chosen = rundir.new(settings.output, settings.data, settings.recipe) if here.first else None
    else:
        chosen = RunDirectory(Path(settings.output) if settings.output else source.parent)
        if chosen.checkpoint.exists() and chosen.checkpoint.resolve() != source.resolve():
            raise TrainerError(f"--output: {chosen.path} holds another run than {source}")
    return chosen or RunDirectory(Path())  # the others write nothing


@contextmanager
def _directory_for(directory: RunDirectory, here: World) -> Iterator[None]:
    """Claims the directory, and takes it back if the run fails before its first checkpoint."""
    with here.together():
        if here.first:
            directory.claim()
    try:
        yield
    except BaseException:
        if here.first:
            directory.discard()
        raise


@contextmanager
def _records(loop: Loop, source: Path | None, state: dict[str, Any] | None) -> Iterator[None]:
    """Has the first process keep records while the context lasts."""
    parts = loop.parts
    if not parts.world.first:
        yield
        return
    keep = state["log_lines"] if state else 0
    before = source.with_name(parts.run.log.name) if source else None
    parts.log = Records(parts.run.log, keep, before)
    try:
        yield
    finally:
        parts.log.close()


def _loop(
    settings: Config,
    images: Data,
    directory: RunDirectory,
    state: dict[str, Any] | None,
    here: World,
) -> Loop:
    with here.together():
        steps = plan.make(
            images.train_size,
            settings.batch_size,
            settings.micro_batch,
            here.rank,
            here.size,
            settings.seed,
        )
        torch.backends.cudnn.benchmark = here.device.type == "cuda"
        stem = images.stem if settings.stem == "auto" else settings.stem
        net = model.build(settings.model, len(images.classes), stem, settings.seed)
        model.draw_classifier(net, settings.classifier_std, settings.seed)
        batchnorm.prepare(net, settings.bn_batch, settings.bn_statistics)
        net = net.to(here.device)
        optim = optimizer.build_optimizer(settings, net, steps.steps_per_epoch)
        schedule = optimizer.build_schedule(settings, optim, steps.steps_per_epoch)
    progress = Progress(**state["progress"]) if state else Progress()
    display = Display(
        settings.epochs * steps.steps_per_epoch * settings.batch_size,
        progress.step * settings.batch_size,
        shown=here.first,
    )
    parts = Parts(settings, here, images, steps, net, optim, schedule, directory, None, display)
    loop = Loop(parts, progress)
    if state:
        loop.restore(state)
    return loop


def _introduce(loop: Loop, state: dict[str, Any] | None) -> None:
    """Say what is trained how; a new run's log starts with the same."""
    parts = loop.parts
    settings = parts.config
    title = (
        f"{settings.recipe.upper()}, {settings.model}, {parts.data.name}, "
        f"batch {settings.batch_size}"
    )
    size = sum(parameter.numel() for parameter in parts.model.parameters())
    parts.display.say(
        f"{title}: {size / 1e6:.1f}M parameters, {parts.data.train_size} training and "
        f"{parts.data.test_size} test images of {len(parts.data.classes)} classes at "
        f"{parts.data.image_size} pixels"
    )
    parts.display.say(
        f"{settings.epochs} epochs of {parts.plan.steps_per_epoch} steps, lr {settings.lr:g}, "
        f"weight decay {settings.weight_decay:g}, on {parts.world.size} x "
        f"{parts.world.device.type}, {parts.plan.micro_batches} x {parts.plan.micro_batch} "
        f"images a step each"
    )
    if state is not None:
        parts.display.say(f"resumed at step {loop.progress.step} of {loop.total_steps}")
    elif parts.log is not None:
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        parts.log.write(
            "start",
            title=title,
            config=settings.shaping(),
            data=fingerprint(parts.data) | {"classes": len(parts.data.classes)},
            steps_per_epoch=parts.plan.steps_per_epoch,
            processes=parts.world.size,
            device=parts.world.device.type,
            versions=versions,
        )


def _end(loop: Loop, finished: bool, stop: StopSignals) -> None:
    """The last record: whether the run is complete, and what else ended it."""
    if loop.parts.log is not None:
        step = loop.progress.step
        epoch = round(step / loop.parts.plan.steps_per_epoch, 4)
        why = None if finished else _why(stop)
        loop.parts.log.write("end", step=step, epoch=epoch, finished=finished, stopped_by=why)


def _why(stop: StopSignals) -> str:
    return stop.received.name if stop.received is not None else "--max-steps"


def _conclude(loop: Loop, finished: bool, stop: StopSignals, seconds: float) -> None:
    """The last lines: the result, or how to go on."""
    parts, progress = loop.parts, loop.progress
    say, run = parts.display.say, parts.run
    if finished:
        count = round(progress.last_accuracy * parts.data.test_size)
        say(
            f"final test accuracy: {progress.last_accuracy:.2%} ({count} of "
            f"{parts.data.test_size}), best {progress.best_accuracy:.2%} after epoch "
            f"{progress.best_epoch}; {seconds:.0f} s"
        )
        say(f"checkpoint: {run.checkpoint}")
        say(f"log:        {run.log}")
        say(f"picture:    {run.picture}")
        return
    say(
        f"stopped by {_why(stop)} at step {progress.step} of {loop.total_steps}; go on with: "
        f"python -m fastlars.trainer --resume {run.checkpoint}"
    )
