"""One run from its command line to its last line of output."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastlars.trainer.config import command_line
from fastlars.trainer.config.command_line import Command
from fastlars.trainer.config.settings import Config
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.data.load import load_data
from fastlars.trainer.errors import TrainerError, printable
from fastlars.trainer.model import memory
from fastlars.trainer.model.context import Progress, TrainingContext, build, fingerprint
from fastlars.trainer.model.optimizer import check_environment
from fastlars.trainer.output import checkpoint, manifest, report, tensorboard
from fastlars.trainer.output import directory as rundir
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.display import Display
from fastlars.trainer.output.mllog import MLLog
from fastlars.trainer.output.records import Records, read
from fastlars.trainer.output.tensorboard import TensorBoard
from fastlars.trainer.process.exit import traces_in
from fastlars.trainer.process.signals import StopSignals
from fastlars.trainer.process.world import World, connect, may_restart, restarted
from fastlars.trainer.run import dry_run, find_lr, loop
from fastlars.trainer.run.journal import Journal
from fastlars.trainer.run.replica import Replica


def run(command: Command) -> int:
    """Do what the command line says; return the process's exit status."""
    device = command.given.get("device", Config.device)
    timeout = command.given.get("timeout", Config.timeout)
    with connect(device, timeout) as world:
        with world.raise_on_all_ranks():
            check_environment(world.device)
            if not (command.given.get("output") or command.resume) and may_restart():
                text = "--max-restarts needs --output, for a restarted run to find itself"
                raise TrainerError(text)
        if command.find_lr:
            return _find_lr(command, world)
        return _dry_run(command, world) if command.dry_run else _train(command, world)


@dataclass(frozen=True)
class _Job:
    """What a command line amounts to, before anything is written."""

    context: TrainingContext
    directory: RunDirectory
    display: Display
    source: Path | None  # the checkpoint to resume from
    state: dict[str, Any] | None  # its contents


@contextmanager
def _job(command: Command, world: World) -> Iterator[_Job]:
    """What is to be trained (its images are not yet read), and its directory, locked meanwhile.

    The checkpoint is read when the directory is locked: until then another run may replace it.
    """
    again = restarted(world)
    with world.raise_on_all_ranks():
        source = _source(command, again)
        if source is None:
            config = command_line.new_config(command.given, world.size)
    if len(set(world.gather(source and str(source)))) > 1:
        text = "--resume: the processes do not see the same checkpoint: --output must be on a disk "
        raise TrainerError(text + "that all of them share", everywhere=True)

    def choose() -> RunDirectory:
        if source is not None:
            return rundir.continuation_dir(source, command.given.get("output", ""))
        return rundir.for_new_run(config.output, config.data, config.recipe)

    with _claimed(choose, world) as directory:
        with world.raise_on_all_ranks():
            state, progress = None, Progress()
            if source is not None:
                with checkpoint.fitting(source):
                    state = checkpoint.load(source)
                    checkpoint.check(state)
                    given, saved = command.given, state["config"]
                    config = command_line.resumed_config(given, saved, str(source))
                    progress = Progress.saved(state["progress"])
            if config.tensorboard and world.first:
                tensorboard.check(directory.tensorboard)
            data = load_data(config, world.device)
            if source is None:
                config = _for_images(data, command, world)
            if state is not None and source is not None:
                with checkpoint.fitting(source):
                    _check_images(data, state["data"])
        _check_shared(data, world)
        context, display = _built(config, data, progress, world)
        yield _Job(context, directory, display, source, state)


def _for_images(data: Data, command: Command, world: World) -> Config:
    """A new run's configuration, now that it is known whether its images are small."""
    small = data.stem == "small"
    return command_line.new_config(command.given, world.size, small_images=small)


def _source(command: Command, again: bool) -> Path | None:
    """The checkpoint to resume from; after a restart, what the same command line has reached."""
    output = command.given.get("output", "")
    source = rundir.checkpoint_path(command.resume, output, again)
    if source is None or not again:
        return source
    own = RunDirectory(Path(output) if output else source.parent)
    reached = os.path.exists(own.checkpoint) and manifest.started_by(command.line, own.settings)
    return own.checkpoint if reached else source


@contextmanager
def _claimed(choose: Callable[[], RunDirectory], world: World) -> Iterator[RunDirectory]:
    """Let the first process choose the run's directory, and lock it while the context lasts.

    The other processes write nothing.
    """
    directory, warning = RunDirectory(Path()), ""
    try:
        with world.raise_on_all_ranks():
            if world.first:
                directory = choose()
                warning = directory.claim()
        if warning:
            print(printable(f"warning: {warning}"), file=sys.stderr)
        yield directory
    finally:
        directory.release()


def _built(
    config: Config, data: Data, progress: Progress, world: World
) -> tuple[TrainingContext, Display]:
    """What is trained, and its terminal; a run that the memory cannot hold is refused."""
    context = build(config, data, progress, world)
    total, done = (steps * config.batch_size for steps in (context.total_steps, progress.step))
    display = Display(total, done, shown=world.first)
    warning = memory.check(context)
    if warning:
        display.warn(warning)
    return context, display


def _dry_run(command: Command, world: World) -> int:
    with _job(command, world) as job:
        context = job.context
        job.display.say(*report.introduction(context))
        context.data.prepare()
        total = min(context.total_steps, context.config.max_steps or context.total_steps)
        left = max(total - context.progress.step, 0)
        job.display.say(*dry_run.describe(context, left))
        job.display.say(f"nothing was written; a run would write in {job.directory.path}")
    return 0


def _find_lr(command: Command, world: World) -> int:
    with world.raise_on_all_ranks():
        settings = find_lr.swept(command_line.new_config(command.given, world.size))
        images = load_data(settings, world.device)
        settings = find_lr.swept(_for_images(images, command, world))
    _check_shared(images, world)
    name = f"{settings.recipe}-lr"
    choose = partial(rundir.output_or_unused, settings.output, settings.data, name)
    with _claimed(choose, world) as directory, StopSignals() as stop:
        context, display = _built(settings, images, Progress(), world)
        display.say(*find_lr.introduction(context, command.given))
        images.prepare()
        if command.dry_run:
            display.say(*dry_run.describe(context, find_lr.STEPS))
            display.say(f"nothing was written; a sweep would write in {directory.path}")
            return 0
        losses = find_lr.sweep(context, stop)
        if world.first:
            display.say(*find_lr.write(context, losses, directory.path, display.warn))
    return 0


def _train(command: Command, world: World) -> int:
    started = time.perf_counter()
    with _job(command, world) as job, traces_in(job.directory.path), StopSignals() as stop:
        context, display, directory = job.context, job.display, job.directory
        replica = Replica(context)
        with _journal(command, job, replica) as journal:
            _introduce(journal, job)
            context.data.prepare()
            with display:
                finished = loop.train(context, replica, journal, stop)
                # Perhaps only another process got the signal.
                received = world.first_given(stop.received)
                stopped_by = None if finished else received.name if received else "--max-steps"
                journal.end(stopped_by)
    if stopped_by is not None:
        display.say(report.stopped(context, directory, stopped_by, started=journal.started))
    elif world.first:  # the others keep no records
        display.say(*report.conclusion(context, directory, time.perf_counter() - started))
    return 0 if finished or received is None else 128 + received


def _check_shared(data: Data, world: World) -> None:
    """Raise TrainerError where the processes do not see the same images."""
    seen = world.gather(fingerprint(data))
    if any(other != seen[0] for other in seen):
        text = f"--data: the processes do not see the same images in {data.name}"
        raise TrainerError(text, everywhere=True)


def _check_images(data: Data, before: dict[str, Any]) -> None:
    """Raise TrainerError where the images are not those that the run was started with."""
    for what, now in fingerprint(data).items():
        if now != before[what]:
            raise TrainerError(
                f"--data: {data.name} differs from the images the run was started with: "
                f"{what} is {_short(now)}, was {_short(before[what])}"
            )


def _short(value: Any) -> str:
    return f"{len(value)} classes from {value[0]}" if isinstance(value, list) else str(value)


@contextmanager
def _journal(command: Command, job: _Job, replica: Replica) -> Iterator[Journal]:
    """The run's journal; a resumed run is restored from its checkpoint."""
    context, directory, world = job.context, job.directory, job.context.world
    records, first_step = None, context.progress.step
    with world.raise_on_all_ranks():
        if world.first:
            keep = job.state["log_lines"] if job.state else 0
            before = job.source.with_name(directory.log.name) if job.source else None
            records = Records(directory.log, keep, before)

    def open_files() -> None:
        """Write the first files; those of a new run replace an earlier run's."""
        manifest.write(context, directory, command.line, first_step)
        with world.raise_on_all_ranks():
            if records is None:
                return
            if job.state is None:
                directory.remove_old_pictures()
            # The board lacks all records if the run was elsewhere or had no --tensorboard.
            known = job.state["log_lines"] if job.state and directory.tensorboard.exists() else 0
            records.open()
            if context.config.tensorboard:
                board = TensorBoard(directory.tensorboard, first_step, job.display.warn)
                for record in read(directory.log)[known:]:
                    board.record(record)
                records.listeners.append(board)

    journal = Journal(context, replica.average, directory, records, job.display, open_files)
    try:
        if job.state is not None and job.source is not None:
            with world.raise_on_all_ranks(), checkpoint.fitting(job.source):
                journal.restore(job.state)
        yield journal
    finally:
        if records is not None:
            records.close()


def _introduce(journal: Journal, job: _Job) -> None:
    """Say what is trained how; a new run's records start with that."""
    context, records, say = job.context, journal.records, job.display.say
    if records is not None and context.config.mllog:
        records.listeners.append(MLLog(context, say))
    output = report.fact("output", str(job.directory.path)) if records is not None else ()
    say(*report.introduction(context), *output)
    if job.state is not None:
        say(f"resumed at step {context.progress.step} of {context.total_steps}")
    elif records is not None:
        records.write("start", **report.start_record(context))
