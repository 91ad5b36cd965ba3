"""--dry-run: what a run would do, and the memory and time that it would take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.model import memory
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import report
from fastlars.trainer.run import loop
from fastlars.trainer.run.meter import Meter
from fastlars.trainer.run.replica import Replica

_ROOM = 256e6  # bytes of activations in a timed step on a CPU; a GPU takes what it has
_STEPS = 3  # timed, after one that is not
_FILLED = 0.8  # of a GPU's memory, by a timed step


def describe(context: TrainingContext, left: int) -> Iterator[str]:
    """Estimates of memory and of the time of `left` steps; every process takes part.

    The model of `context` is trained for some steps, and of no use afterwards.
    """
    config, share = context.config, context.order.micro_batch
    needed = memory.needed(context)
    held = sum(needed.values()) - needed["activations"]
    images = _timed_images(context, held, needed["activations"] / share)
    seconds = _step_seconds(context, images)
    states = [value for of_one in context.optimizer.state.values() for value in of_one.values()]
    needed["optimizer states"] = memory.nbytes(filter(torch.is_tensor, states))
    listed = ", ".join(f"{what} {memory.size(count)}" for what, count in needed.items())
    readers = config.workers if config.data != "digits" else 0
    yield from report.fact(
        "needs",
        f"memory of a process: {memory.size(sum(needed.values()))}, of which {listed}; activations "
        f"are those of {share} images"
        + (f"; without the {readers} processes that read images" if readers else ""),
    )
    if context.world.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(context.world.device)
        yield from report.fact(
            "GPU", f"{memory.size(whole)}, of which {memory.size(free)} are free"
        )
    step = max(context.world.gather(seconds)) * context.order.micro_batches * share / images
    yield from report.fact(
        "time",
        f"{_duration(step * left)} for {left} steps, {step:.3g} s a step, from {_STEPS} steps of "
        f"{images} images a process on this machine; without reading and evaluation",
    )


def _timed_images(context: TrainingContext, held: float, for_each: float) -> int:
    """Images of a timed step: a whole micro-batch, as far as there is room for it."""
    room = _ROOM
    if context.world.device.type == "cuda":
        room = _FILLED * torch.cuda.mem_get_info(context.world.device)[0] - held
    least = min(context.config.bn_batch or 2, context.order.micro_batch)
    return max(least, min(int(room / for_each), context.order.micro_batch))


def _step_seconds(context: TrainingContext, images: int) -> float:
    """Median time of a step with so many images in each process."""
    world = context.world
    wait = torch.get_device_module(world.device).synchronize
    batch = images * world.size
    steps = BatchOrder(
        context.data.train_size, batch, images, world.rank, world.size, context.config.seed
    )
    small = replace(context, config=replace(context.config, batch_size=batch), order=steps)
    replica, meter, times = Replica(small), Meter(world.device), []
    # All are read before the first step is timed.
    for batch_of_one in list(islice(context.data.train(steps.from_step(0)), _STEPS + 1)):
        wait()
        start = time.perf_counter()
        loop.step(small, replica, iter([batch_of_one]), meter)
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
