"""What a run would do, need and take: --dry-run. Nothing is written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fastlars.trainer import batchnorm, plan
from fastlars.trainer.meter import Meter
from fastlars.trainer.parts import Parts
from fastlars.trainer.precision import Precision
from fastlars.trainer.step import Step

_ROOM = 256e6  # bytes of activations in a timed step on a CPU; a GPU takes what it has
_STEPS = 3  # timed, after one that is not
_FILLED = 0.8  # of a GPU's memory, by a timed step


def describe(parts: Parts, done: int) -> Iterator[str]:
    """The schedule, and estimates of memory and time; every process takes part.

    Args:
        parts: the run; its model is trained for some steps, and of no use afterwards.
        done: steps that the run has behind it.
    """
    config, share = parts.config, parts.plan.micro_batch
    total = config.epochs * parts.plan.steps_per_epoch
    warmup = round(config.warmup_epochs * parts.plan.steps_per_epoch)
    begin = f"{warmup} of warm-up from {config.warmup_from:g}, then " if warmup else ""
    yield f"{total - done} steps: {begin}schedule {config.schedule} from {config.lr:g}"
    precision = Precision(config.precision, parts.world.device)
    fixed, for_each = _activations(parts, precision)
    needed = _held(parts) | {"activations": fixed + for_each * share}
    images = _timed_images(parts, sum(needed.values()) - needed["activations"] + fixed, for_each)
    seconds = _step_seconds(parts, precision, images)
    needed["optimizer states"] = _bytes(_tensors(parts.optimizer.state))
    listed = ", ".join(f"{what} {_size(count)}" for what, count in needed.items())
    yield (
        f"memory of a process: {_size(sum(needed.values()))}, of which {listed}; activations are "
        f"those kept for the backward pass, measured with few images and scaled to {share}"
    )
    if parts.world.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(parts.world.device)
        yield f"the GPU has {_size(whole)}, of which {_size(free)} are free while this one is told"
    step = max(parts.world.gather(seconds)) * parts.plan.micro_batches * share / images
    yield (
        f"time: {_duration(step * (total - done))}, {step:.3g} s a step, from {_STEPS} steps of "
        f"{images} images a process on this machine; without reading of images and evaluation"
    )


def _held(parts: Parts) -> dict[str, int]:
    """Bytes that do not depend on the images."""
    weights = _bytes(_state(parts))
    gradients = _bytes(p for p in parts.model.parameters() if p.requires_grad)
    held = {"weights": weights, "gradients": gradients, "optimizer states": 2 * gradients}
    if parts.world.size > 1:
        held["buckets of gradients"] = gradients
    if parts.config.ema:
        held["moving average"] = weights
    return held


def _activations(parts: Parts, precision: Precision) -> tuple[float, float]:
    """Bytes kept for the backward pass: those of any batch, and those for each image of it."""
    few = min(parts.config.bn_batch or 2, parts.plan.micro_batch)
    sizes = [few, 2 * few] if 2 * few <= parts.plan.micro_batch else [few]
    indices = torch.arange(sizes[-1])
    images, labels = next(iter(parts.data.train(iter([(0, indices)]))))
    # Clones: the memory of a part is that of the whole.
    measured = [
        _kept(parts, precision, images[:size].clone(), labels[:size].clone()) for size in sizes
    ]
    if len(sizes) == 1:
        return 0.0, measured[0] / few
    for_each = (measured[1] - measured[0]) / few
    return measured[0] - for_each * few, for_each


def _kept(parts: Parts, precision: Precision, images: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes of all that autograd keeps of a forward pass, each memory once, weights not."""
    known = {StorageWeakRef(t.untyped_storage()) for t in _state(parts)}
    kept: dict[StorageWeakRef, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        kept[StorageWeakRef(memory)] = memory.nbytes()
        return tensor

    parts.model.train()
    batchnorm.forget(parts.model)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with precision.autocast():
            logits = parts.model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    count = sum(size for memory, size in kept.items() if memory not in known)
    del loss  # until here its graph kept every memory, so that none was counted twice
    return count


def _timed_images(parts: Parts, held: float, for_each: float) -> int:
    """Images of a timed step: a whole micro-batch, as far as there is room for it."""
    room = int(_ROOM / for_each)
    if parts.world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(parts.world.device)
        room = int((_FILLED * free - held) / for_each)
    least = min(parts.config.bn_batch or 2, parts.plan.micro_batch)
    return max(least, min(room, parts.plan.micro_batch))


def _step_seconds(parts: Parts, precision: Precision, images: int) -> float:
    """Median time of a step with so many images in each process."""
    world = parts.world
    batch = images * world.size
    steps = plan.make(
        parts.data.train_size, batch, images, world.rank, world.size, parts.config.seed
    )
    small = replace(parts, config=replace(parts.config, batch_size=batch), plan=steps)
    step, meter = Step(small, precision), Meter(world.device)
    batches = list(islice(parts.data.train(steps.from_step(0)), _STEPS + 1))
    times = []
    for batch_of_one in batches:
        _wait(world.device)
        start = time.perf_counter()
        step.take(iter([batch_of_one]), meter)
        _wait(world.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _state(parts: Parts) -> list[torch.Tensor]:
    return [*parts.model.parameters(), *parts.model.buffers()]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
