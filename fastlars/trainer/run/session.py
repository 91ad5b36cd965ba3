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

from fastlars.trainer.config import command_line
from fastlars.trainer.config.command_line import Command
from fastlars.trainer.config.settings import Config
from fastlars.trainer.data import dataset
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.errors import TrainerError, printable
from fastlars.trainer.model.build import build
from fastlars.trainer.model.context import Progress, TrainingContext, fingerprint, progress_of
from fastlars.trainer.model.optimizer import check_environment
from fastlars.trainer.output import checkpoint, manifest, report, tensorboard
from fastlars.trainer.output import directory as rundir
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.mllog import MLLog
from fastlars.trainer.output.records import Records, read
from fastlars.trainer.output.tensorboard import TensorBoard
from fastlars.trainer.process.exit import traces_in
from fastlars.trainer.process.signals import StopSignals
from fastlars.trainer.process.world import World, connect, restarted
from fastlars.trainer.run import dry_run, find_lr
from fastlars.trainer.run.loop import Loop


def run(command: Command) -> int:
    """Do what the command line says; the process's exit status."""
    device = command.given.get("device", Config.device)
    timeout = command.given.get("timeout", Config.timeout)
    with connect(device, timeout) as here:
        with here.raise_on_all_ranks():
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
    with here.raise_on_all_ranks():
        source = _source(command, again)
        if source is None:
            settings = command_line.new_config(command.given, here.size)
    if len(set(here.gather(source and str(source)))) > 1:
        text = "--resume: the processes do not see the same checkpoint: --output must be on a disk "
        raise TrainerError(text + "that all of them share", everywhere=True)

    def choose() -> RunDirectory:
        if source is not None:
            return rundir.continuation_dir(source, command.given.get("output", ""))
        return rundir.new(settings.output, settings.data, settings.recipe)

    with _claimed(choose, here) as directory:
        with here.raise_on_all_ranks():
            state, progress = None, Progress()
            if source is not None:
                with checkpoint.fitting(source):
                    state = checkpoint.load(source)
                    checkpoint.check(state)
                    settings = command_line.resumed_config(
                        command.given, state["config"], str(source)
                    )
                    progress = progress_of(state["progress"])
            if settings.tensorboard and here.first:
                tensorboard.check(directory.tensorboard)
            images = dataset.load(settings, here.device)
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
    reached = os.path.exists(own.checkpoint) and manifest.started_by(command.line, own.settings)
    return own.checkpoint if reached else source


@contextmanager
def _claimed(choose: Callable[[], RunDirectory], here: World) -> Iterator[RunDirectory]:
    """Has the first process choose the run's directory, and own it while the context lasts.

    The others write nothing.
    """
    directory, warning = RunDirectory(Path()), ""
    try:
        with here.raise_on_all_ranks():
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
        context = build(job.settings, job.images, job.directory, done, here)
        job.images.prepare()
        total = job.settings.epochs * context.order.steps_per_epoch
        left = max(min(total, job.settings.max_steps or total) - done, 0)
        hint = report.hint(context, command.given) if job.state is None else ()
        schedule = dry_run.schedule(context, left)
        for line in chain(
            report.introduction(context), hint, [schedule], dry_run.describe(context, left)
        ):
            context.display.say(line)
        context.display.say(f"nothing was written; a run would write in {job.directory.path}")
    return 0


def _find_lr(command: Command, here: World) -> int:
    with here.raise_on_all_ranks():
        settings = find_lr.swept(command_line.new_config(command.given, here.size))
        images = dataset.load(settings, here.device)
    name = f"{settings.recipe}-lr"
    choose = partial(rundir.where, settings.output, settings.data, name)
    with _claimed(choose, here) as directory, StopSignals() as stop:
        context = build(settings, images, directory, 0, here)
        images.prepare()
        for line in find_lr.introduction(context, command.given):
            context.display.say(line)
        if command.dry_run:
            for line in dry_run.describe(context, find_lr.STEPS):
                context.display.say(line)
            context.display.say(f"nothing was written; a sweep would write in {directory.path}")
            return 0
        losses = find_lr.sweep(context, stop)
        if here.first:
            for line in find_lr.write(context, losses, directory.path):
                context.display.say(line)
    return 0


def _train(command: Command, here: World) -> int:
    started = time.perf_counter()
    with _job(command, here) as job, traces_in(job.directory.path), StopSignals() as stop:
        loop = _loop(job, command, here)
        job.images.prepare()
        with _records(loop, job), loop.context.display:
            _introduce(loop, job.state, command)
            finished = loop.run(stop)
            # It may have reached another process alone.
            received = here.first_given(stop.received)
            stopped_by = None if finished else received.name if received else "--max-steps"
            _end(loop, stopped_by)
    for line in report.conclusion(loop, stopped_by, time.perf_counter() - started):
        loop.context.display.say(line)
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
    context = loop.context
    try:
        with context.world.raise_on_all_ranks():
            if context.world.first:
                keep = job.state["log_lines"] if job.state else 0
                before = job.source.with_name(context.run.log.name) if job.source else None
                context.log = Records(context.run.log, keep, before)
                if context.config.mllog:
                    context.log.listeners.append(MLLog(context, loop.progress))
        yield
    finally:
        if context.log is not None:
            context.log.close()


def _begin(context: TrainingContext, command: Command, job: _Job, step: int) -> None:
    """Write the first files of a run from `step` on; a new run replaces those of an earlier one."""
    manifest.write(context, command.line, step)
    with context.world.raise_on_all_ranks():
        if context.log is None:
            return
        if job.state is None:
            context.run.forget()
        # What a board misses: all, where the run was elsewhere or had no --tensorboard.
        known = job.state["log_lines"] if job.state and context.run.tensorboard.exists() else 0
        context.log.open()
        if context.config.tensorboard:
            board = TensorBoard(context.run.tensorboard, step, context.display.warn)
            for record in read(context.run.log)[known:]:
                board.record(record)
            context.log.listeners.append(board)


def _loop(job: _Job, command: Command, here: World) -> Loop:
    context = build(job.settings, job.images, job.directory, job.progress.step, here)
    step = job.progress.step  # which the loop moves on
    loop = Loop(context, job.progress, lambda: _begin(context, command, job, step))
    if job.state is not None and job.source is not None:
        with here.raise_on_all_ranks(), checkpoint.fitting(job.source):
            loop.restore(job.state)
    return loop


def _introduce(loop: Loop, state: dict[str, Any] | None, command: Command) -> None:
    """Say what is trained how; a new run's log starts with the same."""
    context = loop.context
    hint = report.hint(context, command.given) if state is None else ()
    for line in chain(report.introduction(context), hint):
        context.display.say(line)
    if state is not None:
        context.display.say(f"resumed at step {loop.progress.step} of {loop.total_steps}")
    elif context.log is not None:
        context.log.write("start", **report.start_record(context))


def _end(loop: Loop, stopped_by: str | None) -> None:
    """The last record, and the pictures that are drawn once."""
    if loop.context.log is not None:
        step = loop.progress.step
        epoch = round(step / loop.context.order.steps_per_epoch, 4)
        finished = stopped_by is None
        loop.context.log.write(
            "end", step=step, epoch=epoch, finished=finished, stopped_by=stopped_by
        )
        if loop.begun:
            report.draw_layers(loop.context)
