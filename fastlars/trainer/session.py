"""One run from its command line to its last line of output."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fastlars.trainer import checkpoint, config, data, dryrun, findlr, repeat, report, rundir
from fastlars.trainer.build import build
from fastlars.trainer.config import Command, Config
from fastlars.trainer.data import Data
from fastlars.trainer.distributed import World, restarted, world
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.log import Records, read
from fastlars.trainer.loop import Loop
from fastlars.trainer.mllog import MLLog
from fastlars.trainer.parts import Progress, fingerprint
from fastlars.trainer.rundir import RunDirectory
from fastlars.trainer.signals import StopSignals
from fastlars.trainer.tensorboard import TensorBoard


def run(command: Command) -> int:
    """Do what the command line says; the process's exit status."""
    device = command.given.get("device", Config.device)
    timeout = command.given.get("timeout", Config.timeout)
    with world(device, timeout) as here:
        if command.dry_run:
            return _dry_run(command, here)
        return _find_lr(command, here) if command.find_lr else _train(command, here)


@dataclass(frozen=True)
class _Job:
    """What a command line amounts to, before anything is built or written."""

    settings: Config
    images: Data
    directory: RunDirectory
    source: Path | None  # the checkpoint to go on from,
    state: dict[str, Any] | None  # and what is in it


def _job(command: Command, here: World) -> _Job:
    again = restarted(here)
    with here.together():
        source = _source(command, again)
        state = checkpoint.load(source) if source else None
        settings = (
            config.resumed(command.given, state["config"], str(source))
            if state
            else config.fresh(command.given, here.size)
        )
        images = data.load(settings, here.device)
        _same_images(images, state)
        directory = _directory(settings, source, here)
    return _Job(settings, images, directory, source, state)


def _source(command: Command, again: bool) -> Path | None:
    """The checkpoint to go on from; in a restart, what the same command line has reached since."""
    output = command.given.get("output", "")
    source = rundir.to_resume(command.resume, output, again)
    if source is None or not again:
        return source
    own = rundir.going_on(source, output)
    reached = os.path.exists(own.checkpoint) and repeat.begun_by(command.line, own.settings)
    return own.checkpoint if reached else source


def _dry_run(command: Command, here: World) -> int:
    job = _job(command, here)
    done = job.state["progress"]["step"] if job.state else 0
    parts = build(job.settings, job.images, job.directory, done, here)
    hint = report.hint(parts, command.given) if job.state is None else ()
    for line in chain(report.introduction(parts), hint, dryrun.describe(parts, done)):
        parts.display.say(line)
    parts.display.say(f"nothing was written; a run would write in {job.directory.path}")
    return 0


def _find_lr(command: Command, here: World) -> int:
    with here.together():
        settings = config.fresh(command.given, here.size)
        findlr.check(settings)
        images = data.load(settings, here.device)
    with findlr.directory(settings, here) as directory, StopSignals() as stop:
        parts = build(settings, images, directory, 0, here)
        for line in findlr.introduction(parts, command.given):
            parts.display.say(line)
        losses = findlr.sweep(parts, stop)
        if here.first:
            for line in findlr.write(parts, losses, directory.path):
                parts.display.say(line)
    return 0


def _train(command: Command, here: World) -> int:
    started = time.perf_counter()
    job = _job(command, here)
    directory, source, state = job.directory, job.source, job.state
    with _directory_for(directory, here), StopSignals() as stop:
        loop = _loop(job.settings, job.images, directory, state, here)
        repeat.write(loop.parts, command.line, loop.progress.step)
        with _records(loop, source, state), loop.parts.display, here.connected():
            _introduce(loop, state, command)
            finished = loop.run(stop)
            # It may have reached another process alone.
            signals = [number for number in here.gather(stop.received) if number is not None]
            stopped_by = None if finished else signals[0].name if signals else "--max-steps"
            _end(loop, stopped_by)
    for line in report.conclusion(loop, stopped_by, time.perf_counter() - started):
        loop.parts.display.say(line)
    return 0 if finished or not signals else 128 + signals[0]


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
        chosen = rundir.going_on(source, settings.output)
        if os.path.exists(chosen.checkpoint) and not chosen.checkpoint.samefile(source):
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
    board = parts.run.path / "tensorboard"
    new_board = not board.exists()
    try:
        with parts.world.together():
            if parts.world.first:
                keep = state["log_lines"] if state else 0
                before = source.with_name(parts.run.log.name) if source else None
                parts.log = Records(parts.run.log, keep, before)
                _listen(parts.log, loop, board)
        yield
    except BaseException:
        if parts.world.first and new_board and not parts.run.checkpoint.exists():
            shutil.rmtree(board, ignore_errors=True)
        raise
    finally:
        if parts.log is not None:
            parts.log.close()


def _listen(log: Records, loop: Loop, folder: Path) -> None:
    """Have everything listen that the command line asks for."""
    parts = loop.parts
    if parts.config.tensorboard:
        # Where nothing is there yet, a resumed run was elsewhere, or had no --tensorboard.
        missed = [] if folder.exists() else read(parts.run.log)
        board = TensorBoard(folder, loop.progress.step)
        for record in missed:
            board.record(record)
        log.listeners.append(board)
    if parts.config.mllog:
        log.listeners.append(MLLog(parts, loop.progress))


def _loop(
    settings: Config,
    images: Data,
    directory: RunDirectory,
    state: dict[str, Any] | None,
    here: World,
) -> Loop:
    progress = Progress(**state["progress"]) if state else Progress()
    loop = Loop(build(settings, images, directory, progress.step, here), progress)
    if state:
        loop.restore(state)
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
        report.draw_layers(loop.parts)
