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
from fastlars.trainer.config.command_line import Command, Config
from fastlars.trainer.data import dataset
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.errors import TrainerError, printable
from fastlars.trainer.model import memory
from fastlars.trainer.model.build import build
from fastlars.trainer.model.context import Progress, TrainingContext, fingerprint
from fastlars.trainer.model.optimizer import check_environment
from fastlars.trainer.output import checkpoint, manifest, pictures, report, tensorboard
from fastlars.trainer.output import directory as rundir
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.display import Display
from fastlars.trainer.output.mllog import MLLog
from fastlars.trainer.output.records import Records, read
from fastlars.trainer.output.tensorboard import TensorBoard
from fastlars.trainer.process import failures
from fastlars.trainer.process.signals import StopSignals
from fastlars.trainer.process.world import World, restarted, world
from fastlars.trainer.run import dry_run, find_lr, loop
from fastlars.trainer.run.journal import Journal
from fastlars.trainer.run.replica import Replica


def run(command: Command) -> int:
    """Do what the command line says; the process's exit status."""
    device = command.given.get("device", Config.device)
    timeout = command.given.get("timeout", Config.timeout)
    with world(device, timeout) as here, here.connected():
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
    state: dict[str, Any] | None  # and its contents
    progress: Progress


@contextmanager
def _job(command: Command, here: World) -> Iterator[_Job]:
    """The run's settings, its images (not yet read), and its directory, locked meanwhile.

    The checkpoint is read when the directory is locked: until then another run may replace it.
    """
    again = restarted(here)
    with here.raise_on_all_ranks():
        source = _source(command, again)
        if source is None:
            settings = command_line.fresh(command.given, here.size)
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
                    settings = command_line.resumed(command.given, state["config"], str(source))
                    progress = Progress.saved(state["progress"])
            if settings.tensorboard and here.first:
                tensorboard.check(directory.tensorboard)
            images = dataset.load(settings, here.device)
            if state is not None and source is not None:
                with checkpoint.fitting(source):
                    _same_images(images, state)
        yield _Job(settings, images, directory, source, state, progress)


def _source(command: Command, again: bool) -> Path | None:
    """The checkpoint to go on from; after a restart, what the same command line has reached."""
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


def _built(
    config: Config, images: Data, progress: Progress, here: World
) -> tuple[TrainingContext, Display]:
    """What is trained, and its terminal; a run that the memory cannot hold is refused."""
    context = build(config, images, progress, here)
    total, done = (n * config.batch_size for n in (context.total_steps, progress.step))
    display = Display(total, done, shown=here.first)
    warning = memory.check(context)
    if warning:
        display.warn(warning)
    return context, display


def _dry_run(command: Command, here: World) -> int:
    with _job(command, here) as job:
        context, display = _built(job.settings, job.images, job.progress, here)
        job.images.prepare()
        total = min(context.total_steps, job.settings.max_steps or context.total_steps)
        left = max(total - job.progress.step, 0)
        hint = report.hint(context, command.given) if job.state is None else ()
        for line in chain(report.introduction(context), hint, dry_run.describe(context, left)):
            display.say(line)
        display.say(f"nothing was written; a run would write in {job.directory.path}")
    return 0


def _find_lr(command: Command, here: World) -> int:
    with here.raise_on_all_ranks():
        settings = find_lr.swept(command_line.fresh(command.given, here.size))
        images = dataset.load(settings, here.device)
    name = f"{settings.recipe}-lr"
    choose = partial(rundir.where, settings.output, settings.data, name)
    with _claimed(choose, here) as directory, StopSignals() as stop:
        context, display = _built(settings, images, Progress(), here)
        images.prepare()
        for line in find_lr.introduction(context, command.given):
            display.say(line)
        if command.dry_run:
            for line in dry_run.describe(context, find_lr.STEPS):
                display.say(line)
            display.say(f"nothing was written; a sweep would write in {directory.path}")
            return 0
        losses = find_lr.sweep(context, stop)
        if here.first:
            for line in find_lr.write(context, losses, directory.path, display.warn):
                display.say(line)
    return 0


def _train(command: Command, here: World) -> int:
    started = time.perf_counter()
    with _job(command, here) as job, StopSignals() as stop:
        context, display = _built(job.settings, job.images, job.progress, here)
        replica = Replica(context)
        failures.folder = job.directory.path
        with _journal(command, job, context, replica, display) as journal:
            job.images.prepare()
            with display:
                _introduce(journal, job, command)
                finished = loop.train(context, replica, journal, stop)
                # The signal may have reached another process alone.
                received = stop.of_all(here)
                stopped_by = None if finished else received.name if received else "--max-steps"
                _end(journal, stopped_by)
    seconds = time.perf_counter() - started
    if stopped_by is not None:
        display.say(report.stopped(context, job.directory, stopped_by, started=journal.started))
    elif here.first:  # the others keep no records
        for line in report.conclusion(context, job.directory, seconds):
            display.say(line)
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
def _journal(
    command: Command, job: _Job, context: TrainingContext, replica: Replica, display: Display
) -> Iterator[Journal]:
    """The run's journal, set to the state of the checkpoint that the run goes on from."""
    world, records, first_step = context.world, None, job.progress.step
    with world.raise_on_all_ranks():
        if world.first:
            keep = job.state["log_lines"] if job.state else 0
            before = job.source.with_name(job.directory.log.name) if job.source else None
            records = Records(job.directory.log, keep, before)

    def open_files() -> None:
        """Write the first files; those of a new run replace an earlier run's."""
        manifest.write(context, job.directory, command.line, first_step)
        with world.raise_on_all_ranks():
            if records is None:
                return
            if job.state is None:
                job.directory.forget()
            board = job.directory.tensorboard
            # A board lacks all records where the run was elsewhere or had no --tensorboard.
            known = job.state["log_lines"] if job.state and board.exists() else 0
            records.open()
            if context.config.tensorboard:
                listener = TensorBoard(board, first_step, display.warn)
                for record in read(job.directory.log)[known:]:
                    listener.record(record)
                records.listeners.append(listener)

    journal = Journal(context, replica, job.directory, records, display, open_files)
    try:
        if job.state is not None and job.source is not None:
            with world.raise_on_all_ranks(), checkpoint.fitting(job.source):
                journal.restore(job.state)
        yield journal
    finally:
        if records is not None:
            records.close()


def _introduce(journal: Journal, job: _Job, command: Command) -> None:
    """Say what is trained how; a new run's records start with the same."""
    context, records, display = journal.context, journal.records, journal.display
    if records is not None and context.config.mllog:
        records.listeners.append(MLLog(context, display.say))
    hint = report.hint(context, command.given) if job.state is None else ()
    for line in chain(report.introduction(context), hint):
        display.say(line)
    for line in report.fact("output", str(journal.directory.path)) if context.world.first else ():
        display.say(line)
    if job.state is not None:
        display.say(f"resumed at step {context.progress.step} of {context.total_steps}")
    elif records is not None:
        records.write("start", **report.start_record(context))


def _end(journal: Journal, stopped_by: str | None) -> None:
    """The last record, and the pictures that are drawn once."""
    context, records = journal.context, journal.records
    if records is None:
        return
    step, finished = context.progress.step, stopped_by is None
    epoch = round(step / context.order.steps_per_epoch, 4)
    records.write("end", step=step, epoch=epoch, finished=finished, stopped_by=stopped_by)
    if journal.started:
        with pictures.optional(journal.display.warn):
            pictures.draw_layers(read(journal.directory.log), journal.directory.path)
