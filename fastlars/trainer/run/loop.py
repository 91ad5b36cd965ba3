"""The training loop: steps, evaluations, checkpoints, and an end that can come at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from fastlars.trainer.data.dataset import Batch
from fastlars.trainer.errors import DivergedError, TrainerError
from fastlars.trainer.model import batchnorm
from fastlars.trainer.model.context import Progress, TrainingContext, fingerprint
from fastlars.trainer.model.optimizer import adapted_ratios
from fastlars.trainer.model.precision import Precision
from fastlars.trainer.output import checkpoint, pictures
from fastlars.trainer.output.records import read
from fastlars.trainer.output.retention import Retention
from fastlars.trainer.process.signals import StopSignals
from fastlars.trainer.process.world import StopVote
from fastlars.trainer.run.evaluation import evaluate
from fastlars.trainer.run.meter import Figures, Meter, figures
from fastlars.trainer.run.step import Step

_PICTURE_EVERY = 30.0  # seconds; drawing takes about one
_RATIO_POINTS = 200  # of a run, for each layer


class Loop:
    """Trains `context.model` from `progress` on.

    Args:
        context: the run.
        progress: where it starts from.
        begin: called once, when a first step is taken: before that no file is written.
    """

    def __init__(
        self, context: TrainingContext, progress: Progress, begin: Callable[[], None]
    ) -> None:
        self.context, self.progress = context, progress
        self.window = Meter(context.world.device)
        self.total_steps = context.config.epochs * context.order.steps_per_epoch
        self.log_every = context.config.log_every or min(
            context.order.steps_per_epoch // 10 or 1, 50
        )
        self._precision = Precision(context.config.precision, context.world.device)
        self._stepper = Step(context, self._precision)
        self._kept = Retention(context.run, context.config.keep_last)
        self._begin, self.begun = begin, False
        self._saved: tuple[int, int] | None = None
        # Step of the run's checkpoint, and whether it is the best: a kill may have come before it
        # got all its names.
        self._resumed: tuple[int, bool] | None = None
        self._clock, self._clock_step = time.perf_counter(), progress.step
        self._drawn = time.perf_counter()

    @property
    def unfinished(self) -> bool:
        """Whether there is an epoch left to train or to evaluate."""
        return self.progress.evaluated < self.context.config.epochs

    @property
    def _at_best(self) -> bool:
        """Whether the weights are those of the highest test accuracy so far."""
        at_end = self.progress.step == self.progress.evaluated * self.context.order.steps_per_epoch
        return at_end and self.progress.best_epoch == self.progress.evaluated > 0

    def run(self, stop: StopSignals) -> bool:
        """Train to the end (True), or until `stop` or --max-steps; a checkpoint either way."""
        stop.note()
        batches = self._saved_if_unreadable(
            self.context.data.train(self.context.order.from_step(self.progress.step))
        )
        vote = StopVote(self.context.world)
        limit = self.context.config.max_steps or math.inf
        stopped = False
        while self.unfinished:
            stopped = vote.any(stop.received is not None)
            if stopped or self.progress.step >= limit:
                break
            if self.progress.evaluated < self.progress.step // self.context.order.steps_per_epoch:
                self._finish_epoch()
            else:
                self._train(batches)
        vote.close()
        if self.begun or not stopped:  # stopped before the first step, a run changes nothing
            self._save(final=True)
            self._draw()
        return not self.unfinished

    def _saved_if_unreadable(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; where one cannot be read, the steps so far are saved.

        In one process alone, as others may be amid a step, and not between two micro-batches.
        """
        try:
            yield from batches
        except TrainerError:
            alone = self.context.world.size == 1 and self.context.order.micro_batches == 1
            if self.begun and alone:
                self._save()
            raise

    def _train(self, batches: Iterator[Batch]) -> None:
        config, progress, order = self.context.config, self.progress, self.context.order
        self._step(batches)
        self._start_files()
        progress.step += 1
        self.context.display.advance(config.batch_size)
        if self.context.world.device.type == "cpu":
            seen = figures(self.window.sums)
            self.context.display.figures(seen.loss, seen.accuracy)
        epoch_ends = progress.step % order.steps_per_epoch == 0
        if progress.step % self.log_every == 0 or epoch_ends:
            self._log_window()
        if (progress.step - 1) % max(self.total_steps // _RATIO_POINTS, 1) == 0:
            ratios = adapted_ratios(self.context.optimizer, self.context.model)
            if ratios:
                self._write("trust", ratios=ratios)
        every = config.checkpoint_every
        if every and progress.step % every == 0 and not epoch_ends:
            self._save()

    def _start_files(self) -> None:
        if self.begun:
            return
        self._begin()
        self.begun = True
        if self._resumed is not None:
            step, best = self._resumed
            try:
                self._kept.add_names(step, best=best)
            except checkpoint.NotSavedError as error:
                self.context.display.warn(f"{error}; training goes on")

    def _step(self, batches: Iterator[Batch]) -> None:
        norms = self._stepper.take(batches, self.window)
        if norms:
            self._write("norms", layers=norms)

    def evaluate(self) -> Figures:
        """Loss and accuracy on every test image, once."""
        return evaluate(self.context, self._stepper.model, self._precision)

    def _finish_epoch(self) -> None:
        progress = self.progress
        try:
            test = self.evaluate()
        except TrainerError:
            if self.context.world.size == 1:  # others may be in the middle of their evaluation
                self._save()  # a bad test image must not cost an epoch of training
            raise
        self._check(math.isfinite(test.loss), "the test loss")
        progress.evaluated += 1
        progress.last_accuracy = test.accuracy
        if test.accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = test.accuracy, progress.evaluated
        self._write("test", **asdict(test), best_accuracy=progress.best_accuracy)
        unread = self.context.data.test_size - test.images
        self.context.display.say(
            f"epoch {progress.evaluated}/{self.context.config.epochs}: test accuracy "
            f"{test.accuracy:.2%}, test loss {test.loss:.4f} ({test.images} images"
            + (f"; {unread} could not be read)" if unread else ")")
        )
        self._save()
        if time.perf_counter() - self._drawn > _PICTURE_EVERY:
            self._draw()
        self._clock, self._clock_step = time.perf_counter(), progress.step

    def _log_window(self) -> None:
        """Write the means since the last line; a loss that is no number ends the run."""
        sums, step = self.context.world.total(self.window.sums), self.progress.step
        self._check(math.isfinite(sums[0].item()), "the loss")
        self.window.reset()
        seen, now = figures(sums), time.perf_counter()
        images = (step - self._clock_step) * self.context.config.batch_size
        rate = images / (now - self._clock)
        self._clock, self._clock_step = now, step
        self._write("train", **asdict(seen), lr=self._stepper.lr, images_per_second=round(rate, 1))
        self.context.display.figures(seen.loss, seen.accuracy)

    def _check(self, finite: bool, what: str) -> None:
        """Raise DivergedError unless `what` is `finite`, on which all processes agree."""
        if not finite:
            run = self.context.run
            good = run.checkpoint if self._saved else run.came_from
            left = f"; the last good checkpoint is {good}" if good else ""
            raise DivergedError(
                f"{what} is no finite number at step {self.progress.step}: try a lower --lr or a "
                f"longer --warmup-epochs{left}",
                everywhere=True,
            )

    def _write(self, kind: str, **values: Any) -> None:
        if self.context.log is not None:
            step = self.progress.step
            epoch = step / self.context.order.steps_per_epoch
            self.context.log.write(kind, step=step, epoch=round(epoch, 4), **values)

    def _save(self, *, final: bool = False) -> None:
        """Write a checkpoint, unless this very state is saved already."""
        at = (self.progress.step, self.progress.evaluated)
        if at == self._saved:
            return
        self._start_files()
        context, world = self.context, self.context.world
        if context.config.bn_statistics == "last":
            # Every process has its own; of "running" ones the first one's count, which it saves.
            batchnorm.share(context.model, world, "last")
            if self._stepper.average is not None:
                batchnorm.share(self._stepper.average.module, world, "last")
        window = world.total(self.window.sums)
        self._check(math.isfinite(window[0].item()), "the loss")
        self._check(not world.total(self._broken()).item(), "a weight")
        states = world.gather(checkpoint.random_state())
        problem = None
        with world.raise_on_all_ranks():
            if not context.run.is_owned:
                lost = f"{context.run.path} was removed or given to another run"
                raise TrainerError(f"{lost}: this one, at step {self.progress.step}, stops")
        if context.log is not None:
            try:
                context.log.sync()
                state = self._state(window, states)
                self._kept.save(state, self.progress.step, best=self._at_best)
                self._kept.adopt_best(state["progress"])
            except checkpoint.NotSavedError as error:
                problem = str(error)
        # All must know: those for whom this state is saved take no part when it is tried again.
        problem = world.gather(problem)[0]
        if problem is None:
            self._saved = at
        elif final:
            text = f"{problem}; the previous checkpoint is untouched"
            raise TrainerError(text, everywhere=True)
        else:
            context.display.warn(f"{problem}; training goes on")

    def _broken(self) -> torch.Tensor:
        """How many weights and statistics of batch norm are no finite numbers."""
        average = self._stepper.average
        # Not the average's own buffer, a count that stays on the CPU.
        networks = [self.context.model, *([] if average is None else [average.module])]
        tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
        return torch.stack([torch.isfinite(t).logical_not().sum() for t in tensors]).sum()

    def _state(self, window: torch.Tensor, random_states: list[Any]) -> dict[str, Any]:
        context, average = self.context, self._stepper.average
        return {
            "config": context.config.shaping(),
            "data": fingerprint(context.data),
            "model": context.model.state_dict(),
            "optimizer": context.optimizer.state_dict(),
            "schedule": context.schedule.state_dict(),
            "scaler": self._precision.state_dict(),
            "average": average.state_dict() if average is not None else None,
            "progress": asdict(self.progress),
            "window": window,
            "random": random_states,
            "log_lines": context.log.lines if context.log is not None else 0,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that `_state` made."""
        context = self.context
        context.model.load_state_dict(state["model"])
        context.optimizer.load_state_dict(state["optimizer"])
        context.schedule.load_state_dict(state["schedule"])
        self._precision.load_state_dict(state["scaler"])
        if self._stepper.average is not None:
            self._stepper.average.load_state_dict(state["average"])
        if context.world.first:  # sums of all processes; the others' are in it
            self.window.sums.copy_(state["window"])
        if context.world.rank < len(state["random"]):
            checkpoint.restore_random_state(state["random"][context.world.rank])
        if context.world.first and context.run.checkpoint.exists():
            self._resumed = self.progress.step, self._at_best

    def _draw(self) -> None:
        if self.context.log is not None:
            with pictures.optional(self.context.display.warn):
                pictures.draw(read(self.context.run.log), self.context.run.picture)
        self._drawn = time.perf_counter()
