"""One run from its command line to its last line of output."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fastlars.trainer import (
    checkpoint,
    config,
    data,
    dryrun,
    failures,
    findlr,
    repeat,
    report,
    rundir,
    tensorboard,
)
from fastlars.trainer.build import build
from fastlars.trainer.config import Command, Config
from fastlars.trainer.data import Data
from fastlars.trainer.distributed import World, restarted, world
from fastlars.trainer.errors import TrainerError, printable
from fastlars.trainer.log import Records, read
from fastlars.trainer.loop import Loop
from fastlars.trainer.mllog import MLLog
from fastlars.trainer.optimizer import check_environment
from fastlars.trainer.parts import Parts, Progress, fingerprint, progress_of
from fastlars.trainer.rundir import RunDirectory
from fastlars.trainer.signals import StopSignals
from fastlars.trainer.tensorboard import TensorBoard


def run(command: Command) -> int:
    """Do what the command line says; the process's exit status."""
    device = command.given.get("device", Config.device)
    timeout = command.given.get("timeout", Config.timeout)
    with world(device, timeout) as here, here.connected():
        with here.together():
            check_environment(here.device)
        if command.find_lr:
            return _find_lr(command, here)
        return _dry_run(command, here) if command.dry_run else _train(command, here)


@dataclass(frozen=True)
class _Job:
    """What a command line amounts to, before anything is built or written."""

    settings: Config
    images: Data
    directory: RunDirectory
    source: Path | None  # the checkpoint to go on from,
    state: dict[str, Any] | None  # and what is in it
    progress: Progress


@contextmanager
def _job(command: Command, here: World) -> Iterator[_Job]:
    """The run's settings, its images (not yet read) and its directory, which is its own meanwhile.

    The checkpoint is read when the directory is locked: until then another run may replace it.
    """
    again = restarted(here)
    with here.together():
        source = _source(command, again)
        if source is None:
            settings = config.fresh(command.given, here.size)
    if len(set(here.gather(source and str(source)))) > 1:
        text = "--resume: the processes do not see the same checkpoint: --output must be on a disk "
        raise TrainerError(text + "that all of them share", everywhere=True)

    def choose() -> RunDirectory:
        if source is not None:
            return rundir.going_on(source, command.given.get("output", ""))
        return rundir.new(settings.output, settings.data, settings.recipe)

    with _claimed(choose, here) as directory:
        with here.together():
            state, progress = None, Progress()
            if source is not None:
                with checkpoint.fitting(source):
                    state = checkpoint.load(source)
                    checkpoint.check(state)
                    settings = config.resumed(command.given, state["config"], str(source))
                    progress = progress_of(state["progress"])
            if settings.tensorboard and here.first:
                tensorboard.check(directory.tensorboard)
            images = data.load(settings, here.device)
            if state is not None and source is not None:
                with checkpoint.fitting(source):
                    _same_images(images, state)
        yield _Job(settings, images, directory, source, state, progress)


def _source(command: Command, again: bool) -> Path | None:
    """The checkpoint to go on from; in a restart, what the same command line has reached since."""
    output = command.given.get("output", "")
    source = rundir.to_resume(command.resume, output, again)
    if source is None or not again:
        return source
    own = RunDirectory(Path(output) if output else source.parent)
    reached = os.path.exists(own.checkpoint) and repeat.begun_by(command.line, own.settings)
    return own.checkpoint if reached else source


@contextmanager
def _claimed(choose: Callable[[], RunDirectory], here: World) -> Iterator[RunDirectory]:
    """Has the first process choose the run's directory, and own it while the context lasts.

    The others write nothing.
    """
    directory, warning = RunDirectory(Path()), ""
    try:
        with here.together():
            if here.first:
                directory = choose()
                warning = directory.claim()
        if warning:
            print(printable(f"warning: {warning}"), file=sys.stderr)
        yield directory
    finally:
        directory.release()


def _dry_run(command: Command, here: World) -> int:
    with _job(command, here) as job:
        done = job.progress.step
        parts = build(job.settings, job.images, job.directory, done, here)
        job.images.prepare()
        total = job.settings.epochs * parts.plan.steps_per_epoch
        left = max(min(total, job.settings.max_steps or total) - done, 0)
        hint = report.hint(parts, command.given) if job.state is None else ()
        schedule = dryrun.schedule(parts, left)
        for line in chain(
            report.introduction(parts), hint, [schedule], dryrun.describe(parts, left)
        ):
            parts.display.say(line)
        parts.display.say(f"nothing was written; a run would write in {job.directory.path}")
    return 0


def _find_lr(command: Command, here: World) -> int:
    with here.together():
        settings = findlr.swept(config.fresh(command.given, here.size))
        images = data.load(settings, here.device)
    name = f"{settings.recipe}-lr"
    choose = partial(rundir.where, settings.output, settings.data, name)
    with _claimed(choose, here) as directory, StopSignals() as stop:
        parts = build(settings, images, directory, 0, here)
        images.prepare()
        for line in findlr.introduction(parts, command.given):
            parts.display.say(line)
        if command.dry_run:
            for line in dryrun.describe(parts, findlr.STEPS):
                parts.display.say(line)
            parts.display.say(f"nothing was written; a sweep would write in {directory.path}")
            return 0
        losses = findlr.sweep(parts, stop)
        if here.first:
            for line in findlr.write(parts, losses, directory.path):
                parts.display.say(line)
    return 0


def _train(command: Command, here: World) -> int:
    started = time.perf_counter()
    with _job(command, here) as job, StopSignals() as stop:
        loop = _loop(job, command, here)
        failures.folder = job.directory.path
        job.images.prepare()
        with _records(loop, job), loop.parts.display:
            _introduce(loop, job.state, command)
            finished = loop.run(stop)
            # It may have reached another process alone.
            received = stop.of_all(here)
            stopped_by = None if finished else received.name if received else "--max-steps"
            _end(loop, stopped_by)
    for line in report.conclusion(loop, stopped_by, time.perf_counter() - started):
        loop.parts.display.say(line)
    return 0 if finished or received is None else 128 + received


def _same_images(images: Data, state: dict[str, Any]) -> None:
    for what, now in fingerprint(images).items():
        before = state["data"][what]
        if now != before:
            raise TrainerError(
                f"--data: {images.name} differs from the images the run was started with: "
                f"{what} is {_short(now)}, was {_short(before)}"
            )


def _short(value: Any) -> str:
    return f"{len(value)} classes from {value[0]}" if isinstance(value, list) else str(value)


@contextmanager
def _records(loop: Loop, job: _Job) -> Iterator[None]:
    """Has the first process keep records while the context lasts."""
    parts = loop.parts
    try:
        with parts.world.together():
            if parts.world.first:
                keep = job.state["log_lines"] if job.state else 0
                before = job.source.with_name(parts.run.log.name) if job.source else None
                parts.log = Records(parts.run.log, keep, before)
                if parts.config.mllog:
                    parts.log.listeners.append(MLLog(parts, loop.progress))
        yield
    finally:
        if parts.log is not None:
            parts.log.close()


def _begin(parts: Parts, command: Command, job: _Job, step: int) -> None:
    """Write the first files of a run from `step` on; a new run replaces those of an earlier one."""
    repeat.write(parts, command.line, step)
    with parts.world.together():
        if parts.log is None:
            return
        if job.state is None:
            parts.run.forget()
        # What a board misses: all, where the run was elsewhere or had no --tensorboard.
        known = job.state["log_lines"] if job.state and parts.run.tensorboard.exists() else 0
        parts.log.open()
        if parts.config.tensorboard:
            board = TensorBoard(parts.run.tensorboard, step, parts.display.warn)
            for record in read(parts.run.log)[known:]:
                board.record(record)
            parts.log.listeners.append(board)


def _loop(job: _Job, command: Command, here: World) -> Loop:
    parts = build(job.settings, job.images, job.directory, job.progress.step, here)
    step = job.progress.step  # which the loop moves on
    loop = Loop(parts, job.progress, lambda: _begin(parts, command, job, step))
    if job.state is not None and job.source is not None:
        with here.together(), checkpoint.fitting(job.source):
            loop.restore(job.state)
    return loop


def _introduce(loop: Loop, state: dict[str, Any] | None, command: Command) -> None:
    """Say what is trained how; a new run's log starts with the same."""
    parts = loop.parts
    hint = report.hint(parts, command.given) if state is None else ()
    for line in chain(report.introduction(parts), hint):
        parts.display.say(line)
    if state is not None:
        parts.display.say(f"resumed at step {loop.progress.step} of {loop.total_steps}")
    elif parts.log is not None:
        parts.log.write("start", **report.start_record(parts))


def _end(loop: Loop, stopped_by: str | None) -> None:
    """The last record, and the pictures that are drawn once."""
    if loop.parts.log is not None:
        step = loop.progress.step
        epoch = round(step / loop.parts.plan.steps_per_epoch, 4)
        finished = stopped_by is None
        loop.parts.log.write(
            "end", step=step, epoch=epoch, finished=finished, stopped_by=stopped_by
        )
        if loop.begun:
            report.draw_layers(loop.parts)
