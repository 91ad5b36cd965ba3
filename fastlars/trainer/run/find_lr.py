"""A sweep over learning rates: what the loss does while the rate grows with every step.

After Smith 2017 (arXiv:1506.01186), section 3.3, with a rate that grows exponentially.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.optim.lr_scheduler import LambdaLR

from fastlars.trainer.config.settings import Config, flag
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import atomic, pictures, report
from fastlars.trainer.output.display import Display
from fastlars.trainer.process.signals import Interrupted, StopSignals
from fastlars.trainer.process.world import StopVote
from fastlars.trainer.run import loop
from fastlars.trainer.run.meter import Meter, figures
from fastlars.trainer.run.replica import Replica

STEPS = 100
_LOW, _HIGH = 1e-3, 1e2  # times --lr
_DIVERGED = 4.0  # times the lowest loss so far
_WINDOW = 7  # losses that are averaged


# Settings that a sweep has no use for: it has a schedule and a number of steps of its own, and
# keeps nothing but a picture and a table.
_UNUSED = (
    *("epochs", "schedule", "power", "end_lr", "warmup_epochs", "warmup_from", "ema"),
    *("lr_rmsprop", "rmsprop_center", "rmsprop_period", "rmsprop_transition", "bn_statistics"),
    *("log_every", "tensorboard", "mllog", "checkpoint_every", "keep_last", "max_steps"),
)


def introduction(context: TrainingContext, given: Iterable[str]) -> Iterator[str]:
    """What is swept over, and which of the settings given are of no use to that."""
    config, source = context.config, context.recipe.source
    yield report.title(context)
    yield from report.subject(context)
    yield from report.fact("recipe", f"{config.recipe}, except for rate and schedule: {source}")
    rates = f"lr {_LOW * config.lr:g} to {_HIGH * config.lr:g}"
    steps = f"weight decay {config.weight_decay:g}; up to {STEPS} steps of {report.batch(context)}"
    yield from report.fact("sweep", f"{rates}, {steps}")
    unused = [flag(name) for name in _UNUSED if name in given]
    if unused:
        yield from report.fact("unused", f"--find-lr has no use for {', '.join(unused)}")


def swept(config: Config) -> Config:
    """The configuration of a sweep; TrainerError where it would say nothing."""
    if config.recipe == "akiba":
        raise TrainerError(
            "--find-lr: akiba's first steps are RMSprop's, whatever the rate is: sweep with "
            "--recipe goyal, which akiba becomes",
            everywhere=True,
        )
    # Its own schedule replaces the run's, which must not be what fails.
    return replace(config, schedule="poly", warmup_epochs=0.0, warmup_from=0.0, end_lr=0.0)


def sweep(context: TrainingContext, stop: StopSignals) -> dict[float, float]:
    """The loss of a step at each learning rate; ends when the training diverges.

    The model of `context` is trained, and of no use afterwards.
    """
    config, world = context.config, context.world
    stop.note()  # from here on all processes stop after the same step
    growth = (_HIGH / _LOW) ** (1 / (STEPS - 1))
    context.schedule = LambdaLR(context.optimizer, lambda step: _LOW * growth**step)
    display, replica = Display(STEPS * config.batch_size, 0, shown=world.first), Replica(context)
    batches, meter = context.data.train(context.order.from_step(0)), Meter(world.device)
    vote, losses = StopVote(world), dict[float, float]()
    with display:
        for _ in range(STEPS):
            stopped = vote.any(stop.received is not None)
            if stopped and (received := world.first_given(stop.received)):
                raise Interrupted(received)
            meter.reset()
            result = loop.step(context, replica, batches, meter)
            seen = figures(world.total(meter.sums))
            losses[result.lr] = seen.loss  # a step that fp16 skipped is taken again at its rate
            display.advance(config.batch_size)
            display.figures(seen.loss, seen.accuracy)
            if has_diverged(list(losses.values())):
                break
        vote.close()
    return losses


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the latest losses, over three steps, are not finite or far above the lowest."""
    means = np.convolve(losses, np.ones(3) / 3, "valid") if len(losses) > 2 else np.array(losses)
    return bool(not np.isfinite(losses[-1]) or means[-1] > _DIVERGED * np.nanmin(means))


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over a window around each loss: no lag, which would shift every rate upwards."""
    half = _WINDOW // 2
    return [float(np.mean(losses[max(i - half, 0) : i + half + 1])) for i in range(len(losses))]


def suggest(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """The rates at which smoothed losses fall fastest and are lowest; None where they never fall.

    Fastest: the most negative slope from step to step, up to the lowest loss; rates grow by the
    same factor with every step.
    """
    lowest = int(np.argmin(losses))
    if lowest == 0:
        return None
    slopes = np.gradient(np.asarray(losses))[: lowest + 1]
    return rates[int(np.argmin(slopes))], rates[lowest]


def summary(losses: dict[float, float], found: tuple[float, float] | None) -> str:
    """The result of a sweep; `found` is what `suggest` returned for its smoothed finite losses."""
    rates = list(losses)
    last = rates[-1]
    if found is None:
        return f"nothing: no rate up to {last:.3g} brings the loss below where it begins"
    fastest, lowest = found
    if not np.isfinite(losses[last]):
        ended = f", and NaN or infinite at {last:.3g}"
    elif has_diverged(list(losses.values())):
        ended = f", and over {_DIVERGED:g} times as high at {last:.3g}"
    else:
        ended = f"; {last:.3g} is the highest rate tried"
    falling = lowest == max(rate for rate in rates if np.isfinite(losses[rate]))
    end = f"it {'still falls' if falling else 'is lowest'} at {lowest:.2g}{ended}"
    edge = ", the lowest rate tried" if fastest == rates[0] else ""
    return f"--lr {fastest:.2g}{edge}, where the loss falls fastest; {end}"


def write(
    context: TrainingContext,
    losses: dict[float, float],
    folder: Path,
    warn: Callable[[str], None],
) -> list[str]:
    """Write lr_find.csv and lr_find.png; return the lines that report the result."""
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    if not finite:
        raise TrainerError(f"--find-lr: the loss is NaN or infinite even at {min(losses):.3g}")
    rates, means = list(finite), smoothed(list(finite.values()))
    found, heading = suggest(rates, means), ("step", "lr", "loss", "smoothed_loss")
    rows = zip(range(1, len(rates) + 1), rates, finite.values(), means, strict=True)
    try:
        atomic.write_table([heading, *rows], folder / "lr_find.csv")
    except OSError as error:
        raise TrainerError(f"--find-lr: cannot write in {folder}: {error.strerror}") from None
    lines = [
        *report.fact("suggest", summary(losses, found)),
        *report.fact("table", str(folder / "lr_find.csv")),
    ]
    with pictures.optional(warn):
        figure = pictures.sweep(report.title(context), finite, means, found, _WINDOW)
        pictures.save(figure, folder / "lr_find.png")
        lines += report.fact("picture", str(folder / "lr_find.png"))
    return lines
