"""What the training loop writes: records, rows on the terminal, checkpoints, pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from fastlars.logging import layer_statistics
from fastlars.trainer.data.dataset import Batch
from fastlars.trainer.errors import DivergedError, TrainerError
from fastlars.trainer.model import batchnorm, norms
from fastlars.trainer.model.context import TrainingContext, fingerprint
from fastlars.trainer.output import checkpoint, pictures
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.display import Display
from fastlars.trainer.output.records import Records, read
from fastlars.trainer.output.retention import Retention
from fastlars.trainer.run.meter import Figures, Meter, figures

_PICTURE_EVERY = 30.0  # seconds; drawing takes about one
_RATIO_RECORDS = 200  # of a whole run


class Journal:
    """Everything that a run writes while it trains.

    Attributes:
        meter: loss and accuracy since the last "train" record.
        started: whether the files of the run are open: until the first step nothing is written.

    Args:
        context: what is trained.
        average: the moving average of the model, if there is one.
        directory: where the files go.
        records: metrics.jsonl, in the first process alone.
        display: the terminal.
        open_files: called once, before anything is written.
    """

    def __init__(
        self,
        context: TrainingContext,
        average: AveragedModel | None,
        directory: RunDirectory,
        records: Records | None,
        display: Display,
        open_files: Callable[[], None],
    ) -> None:
        self.context, self.directory = context, directory
        self.records, self.display = records, display
        self.meter = Meter(context.world.device)
        self.started = False
        self._average, self._open_files = average, open_files
        self._retention = Retention(directory, context.config.keep_last)
        steps = context.order.steps_per_epoch
        self._log_every = context.config.log_every or min(steps // 10 or 1, 50)
        self._ratios_every = max(context.total_steps // _RATIO_RECORDS, 1)
        self._saved: tuple[int, int] | None = None  # step and epoch of the last checkpoint
        # Step of the checkpoint that the run resumes from, and whether it is the best one: a kill
        # may have come before that checkpoint got all its names.
        self._resumed: tuple[int, bool] | None = None
        # Of the epoch, as far as it was trained since this process started.
        self._epoch_sums = torch.zeros_like(self.meter.sums, device="cpu")
        self._epoch_step = context.progress.step
        self._lr = 0.0  # of the last step
        self._clock = self._epoch_clock = self._drawn = time.perf_counter()
        self._clock_step = context.progress.step

    @property
    def wants_norms(self) -> bool:
        """Whether the next step is one of those whose norms are recorded."""
        return self.records is not None and self.context.schedule.last_epoch in norms.STEPS

    def record_step(self, lr: float, layers: norms.LayerNorms) -> None:
        """Count a step, and write what is due after it."""
        context, config, progress = self.context, self.context.config, self.context.progress
        if layers:
            self._write("norms", layers=layers)
        self._start()
        progress.step += 1
        self.display.advance(config.batch_size)
        if context.world.device.type == "cpu":  # on a GPU, reading the sums would wait for it
            seen = figures(self.meter.sums)
            self.display.figures(seen.loss, seen.accuracy)
        epoch_ends = progress.step % context.order.steps_per_epoch == 0
        if progress.step % self._log_every == 0 or epoch_ends:
            self._record_training(lr)
        if (progress.step - 1) % self._ratios_every == 0:
            found = layer_statistics(context.model, context.optimizer)
            ratios = {name: layer.trust_ratio for name, layer in found.items()}
            if ratios:
                self._write("trust", ratios=ratios)
        every = config.checkpoint_every
        if every and progress.step % every == 0 and not epoch_ends:
            self.save()

    def record_epoch(self, test: Figures) -> None:
        """Count an epoch, and write its test's figures and a checkpoint."""
        progress = self.context.progress
        self._check(math.isfinite(test.loss), "the test loss")
        progress.evaluated += 1
        progress.last_accuracy = test.accuracy
        if test.accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = test.accuracy, progress.evaluated
        self._write("test", **asdict(test), best_accuracy=progress.best_accuracy)
        self._show_epoch(test)
        self.save()
        if time.perf_counter() - self._drawn > _PICTURE_EVERY:
            self._draw()
        self._clock = self._epoch_clock = time.perf_counter()
        self._clock_step = self._epoch_step = progress.step
        self._epoch_sums.zero_()

    def finish(self, *, stopped: bool) -> None:
        """Write the last checkpoint and picture; nothing after a signal before the first step."""
        if self.started or not stopped:
            self.save(final=True)
            self._draw()

    def end(self, stopped_by: str | None) -> None:
        """Write the last record, and the pictures that are drawn once."""
        self._write("end", finished=stopped_by is None, stopped_by=stopped_by)
        if self.records is not None and self.started:
            with pictures.optional(self.display.warn):
                pictures.draw_layers(read(self.directory.log), self.directory.path)

    def save_if_unreadable(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass on training batches; if one cannot be read, save the steps so far."""
        self._clock = self._epoch_clock = time.perf_counter()  # without the reading of kept images
        with self.saving_if_unreadable(between_steps=self.context.order.micro_batches == 1):
            yield from batches

    @contextmanager
    def saving_if_unreadable(self, *, between_steps: bool = True) -> Iterator[None]:
        """Save before an error of the images ends the run: it must not cost an epoch of training.

        In one process alone, because others may be in the middle of a step or an evaluation, and
        not between two micro-batches of a step.
        """
        try:
            yield
        except TrainerError:
            if self.started and self.context.world.size == 1 and between_steps:
                self.save()
            raise

    def save(self, *, final: bool = False) -> None:
        """Write a checkpoint, unless this very state is saved already.

        A full disk is a warning, but an error if the checkpoint is the `final` one.
        """
        context, world, progress = self.context, self.context.world, self.context.progress
        at = (progress.step, progress.evaluated)
        if at == self._saved:
            return
        self._start()
        networks = [context.model]
        if self._average is not None:
            networks.append(self._average.module)
        if context.config.bn_statistics == "last":
            # Every process has its own; of "running" statistics, those of the first are saved.
            for network in networks:
                batchnorm.share(network, world.size, "last")
        window = world.total(self.meter.sums)
        self._check(math.isfinite(window[0].item()), "the loss")
        self._check(not world.total(count_not_finite(networks)).item(), "a weight")
        with world.raise_on_all_ranks():
            if not self.directory.is_owned:
                lost = f"{self.directory.path} was removed or given to another run"
                raise TrainerError(f"{lost}: this one, at step {progress.step}, stops")
        problem = None
        if self.records is not None:
            try:
                self.records.sync()
                state = self._state(window, self.records.lines)
                self._retention.save(state, progress.step, best=self._is_best)
                self._retention.adopt_best(state["progress"])
            except checkpoint.NotSavedError as error:
                problem = str(error)
        # Every process must know the outcome: one that believes the state is saved would take no
        # part in the next attempt.
        problem = world.gather(problem)[0]
        if problem is None:
            self._saved = at
        elif final:
            text = f"{problem}; the previous checkpoint is untouched"
            raise TrainerError(text, everywhere=True)
        else:
            self.display.warn(f"{problem}; training goes on")

    def restore(self, state: dict[str, Any]) -> None:
        """Set what is trained to a state that `save` wrote."""
        context = self.context
        context.model.load_state_dict(state["model"])
        context.optimizer.load_state_dict(state["optimizer"])
        context.schedule.load_state_dict(state["schedule"])
        context.precision.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        if context.world.first:  # sums of all processes
            self.meter.sums.copy_(state["window"])
        if context.world.first and self.directory.checkpoint.exists():
            self._resumed = context.progress.step, self._is_best

    @property
    def _is_best(self) -> bool:
        """Whether the weights are those of the highest test accuracy so far."""
        progress = self.context.progress
        at_end = progress.step == progress.evaluated * self.context.order.steps_per_epoch
        return at_end and progress.best_epoch == progress.evaluated > 0

    def _start(self) -> None:
        if self.started:
            return
        self._open_files()
        self.started = True
        if self._resumed is not None:
            step, best = self._resumed
            try:
                self._retention.add_names(step, best=best)
            except checkpoint.NotSavedError as error:
                self.display.warn(f"{error}; training goes on")

    def _record_training(self, lr: float) -> None:
        """Write the means since the last record; a loss that is not finite ends the run."""
        context, step = self.context, self.context.progress.step
        sums = context.world.total(self.meter.sums)
        self._check(math.isfinite(sums[0].item()), "the loss")
        self.meter.reset()
        self._epoch_sums += sums
        self._lr = lr
        seen, now = figures(sums), time.perf_counter()
        rate = (step - self._clock_step) * context.config.batch_size / (now - self._clock)
        self._clock, self._clock_step = now, step
        self._write("train", **asdict(seen), lr=lr, images_per_second=round(rate, 1))
        self.display.figures(seen.loss, seen.accuracy)

    def _show_epoch(self, test: Figures) -> None:
        context, progress = self.context, self.context.progress
        seen, lr, loss, accuracy, rate = figures(self._epoch_sums), "-", "-", "-", "-"
        if self._clock > self._epoch_clock:  # not if the run was resumed at the end of this epoch
            lr, loss, accuracy = f"{self._lr:.3g}", f"{seen.loss:.4f}", f"{seen.accuracy:.2%}"
            images = (progress.step - self._epoch_step) * context.config.batch_size
            rate = f"{images / (self._clock - self._epoch_clock):.0f}"
        tested = f"{test.loss:.4f}", f"{test.accuracy:.2%}", f"{progress.best_accuracy:.2%}"
        number = f"epoch {progress.evaluated}/{context.config.epochs}"
        self.display.row(number, lr, loss, accuracy, *tested, rate)
        unread = context.data.test_size - test.images
        if unread:
            total = context.data.test_size
            self.display.say(f"{unread} of {total} test images could not be read")

    def _check(self, finite: bool, what: str) -> None:
        """Raise DivergedError unless `what` is `finite`, on which all processes agree."""
        if not finite:
            good = self.directory.checkpoint if self._saved else self.directory.came_from
            left = f"; the last good checkpoint is {good}" if good else ""
            raise DivergedError(
                f"{what} is NaN or infinite at step {self.context.progress.step}: try a lower "
                f"--lr or a longer --warmup-epochs{left}",
                everywhere=True,
            )

    def _write(self, kind: str, **values: Any) -> None:
        if self.records is not None:
            step = self.context.progress.step
            epoch = step / self.context.order.steps_per_epoch
            self.records.write(kind, step=step, epoch=round(epoch, 4), **values)

    def _state(self, window: torch.Tensor, lines: int) -> dict[str, Any]:
        context, average = self.context, self._average
        return {
            "config": context.config.shaping(),
            "data": fingerprint(context.data),
            "model": context.model.state_dict(),
            "optimizer": context.optimizer.state_dict(),
            "schedule": context.schedule.state_dict(),
            "scaler": context.precision.state_dict(),
            "average": average.state_dict() if average is not None else None,
            "progress": asdict(context.progress),
            "window": window,
            "log_lines": lines,
        }

    def _draw(self) -> None:
        if self.records is not None:
            with pictures.optional(self.display.warn):
                pictures.save(pictures.curves(read(self.directory.log)), self.directory.picture)
        self._drawn = time.perf_counter()


def count_not_finite(networks: list[torch.nn.Module]) -> torch.Tensor:
    """How many weights and statistics of batch norm are not finite."""
    tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    return torch.stack([torch.isfinite(t).logical_not().sum() for t in tensors]).sum()
