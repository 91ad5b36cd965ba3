"""The memory that a process needs, and the memory of the machine: no model is run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model.context import TrainingContext

# Kernels and the allocator take this share on top of the sum: the peaks of seven runs on a CPU, 0.8
# to 4.7 GB, were 1.08 to 1.12 times everything else.
_SPARE = 0.1
_REFUSED = 1.3  # times the machine's memory; above what is free there is a warning
_OWN_CGROUPS, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# The files of a cgroup with its limit and its use, and the cache within that use.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def needed(context: TrainingContext) -> dict[str, float]:
    """Peak bytes of a process, by purpose: of its GPU's memory, or of all memory on a CPU.

    Call it before the first step: resident memory is then Python, its packages, the weights and
    perhaps the images.
    """
    config, data, share = context.config, context.data, context.order.micro_batch
    weights = nbytes([*context.model.parameters(), *context.model.buffers()])
    gradients = nbytes(p for p in context.model.parameters() if p.requires_grad)
    fixed, for_each = activations(context)
    pixels = 3 * data.image_size**2 * share
    on_cpu, there = context.world.device.type == "cpu", data.kept_bytes if data.prepared else 0
    found = {
        "Python and its packages": max(_resident() - weights - there, 0) if on_cpu else 0,
        "weights": weights,
        "gradients": gradients,
        "optimizer states": gradients * (2 if config.recipe in ("lamb", "akiba") else 1),
        "buckets of gradients": gradients if context.world.size > 1 else 0,
        "moving average": weights if config.ema else 0,
        "kept images": data.kept_bytes,
        # Half precision keeps a copy of the images; otherwise they are part of the activations.
        "images of a batch": pixels * (1 if context.precision.name == "fp32" else 5),
        "activations": fixed + for_each * share,
    }
    found["workspaces"] = _SPARE * sum(found.values())
    return {what: count for what, count in found.items() if count}


def check(context: TrainingContext) -> str:
    """Refuse a run that this machine cannot hold; a warning where it may not, else "".

    In every process alike, before images are read.
    """
    need, world = needed(context), context.world
    # Processes on one machine share its memory, but each has its own GPU.
    machines = world.gather(platform.node())
    here = machines.count(platform.node()) if world.device.type == "cpu" else 1
    whole, free = available(world.device)
    total = here * sum(need.values())
    largest = max(need, key=lambda what: need[what])
    where = "this machine" if world.device.type == "cpu" else "the GPU"
    what = (
        f"{'this run needs' if here == 1 else f'{here} processes need'} about {size(total)} of "
        f"memory, of which {largest} {size(here * need[largest])}, and {where} has"
    )
    with world.raise_on_all_ranks():
        if total > _REFUSED * whole:
            raise TrainerError(f"{what} {size(whole)}: {_remedy(context, largest)}")
    return f"{what} {size(free)} free: {_remedy(context, largest)}" if total > free else ""


def _remedy(context: TrainingContext, largest: str) -> str:
    if largest == "kept images":
        return "add --cache off, or set a smaller --image-size"
    config, images = context.config, context.order.micro_batch
    now = f"--micro-batch {images}" if config.micro_batch else f"--batch-size {config.batch_size}"
    smaller = "--micro-batch" if config.micro_batch else "--batch-size or --micro-batch"
    return (
        f"set a smaller {smaller}, --image-size or --model (now {now}, images of "
        f"{context.data.image_size} pixels, {config.model})"
    )


def activations(context: TrainingContext) -> tuple[float, float]:
    """Bytes kept for the backward pass: a fixed part, and a part for each image of the batch."""
    few = min(context.config.bn_batch or 2, context.order.micro_batch)
    sizes = [few, 2 * few] if 2 * few <= context.order.micro_batch else [few]
    measured = [_kept(context, size) for size in sizes]
    if len(sizes) == 1:
        return 0.0, measured[0] / few
    for_each = (measured[1] - measured[0]) / few
    return measured[0] - for_each * few, for_each


def _kept(context: TrainingContext, images: int) -> int:
    """Bytes that autograd keeps of a forward pass, without the weights; each storage counts once.

    The pass runs on the meta device, where tensors have sizes and no memory. That device has no
    autocast: for half precision every tensor is in it, and the copies that autocast makes of the
    weights are added.
    """
    half, side = context.precision.name != "fp32", context.data.image_size

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        kind = torch.half if half and tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=kind)

    tensors = [*context.model.named_parameters(), *context.model.named_buffers()]
    state = {name: meta(tensor).requires_grad_(tensor.requires_grad) for name, tensor in tensors}
    known = {StorageWeakRef(tensor.untyped_storage()) for tensor in state.values()}
    kept: dict[StorageWeakRef, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        kept[StorageWeakRef(memory)] = memory.nbytes()
        return tensor

    pixels = meta(torch.empty(images, 3, side, side, device="meta"))
    labels = torch.empty(images, dtype=torch.int64, device="meta")
    context.model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = functional_call(context.model, state, (pixels,))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    count = sum(size for memory, size in kept.items() if memory not in known)
    del loss  # its graph kept every storage alive, so that no address was used twice
    return count + (nbytes(context.model.parameters()) // 2 if half else 0)


def available(device: torch.device) -> tuple[float, float]:
    """Bytes of the device's memory, and how many of them this process could have now.

    On the CPU, swap counts, and so do the limits of a container or a batch system (cgroups).
    """
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return whole, free + torch.cuda.memory_reserved(device)
    meminfo = _numbers(Path("/proc/meminfo"))
    whole = 1024 * (meminfo["MemTotal:"] + meminfo["SwapTotal:"])
    free = 1024 * (meminfo.get("MemAvailable:", meminfo["MemTotal:"]) + meminfo["SwapFree:"])
    for limit, used in _limits():
        whole, free = min(whole, limit), min(free, limit - used)
    return whole, free + _resident()


def _limits() -> Iterable[tuple[int, int]]:
    """Limit and use in bytes of every cgroup of this process, version 2 or 1."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, place = _CGROUPS / controllers, Path(name.lstrip("/"))
        limit, use, cached = _V1 if controllers else _V2
        for relative in [place, *place.parents]:
            try:
                most = int((root / relative / limit).read_text())
                used = int((root / relative / use).read_text())
            except (OSError, ValueError):  # no such file, or "max"
                continue
            yield most, used - _numbers(root / relative / "memory.stat").get(cached, 0)


def _numbers(path: Path) -> dict[str, int]:
    """The second word of every line of a file, by the first; empty if it cannot be read."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _resident() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def size(count: float) -> str:
    """A number of bytes in MB, GB or TB."""
    for unit, length in (("TB", 1e12), ("GB", 1e9)):
        if count >= length:
            return f"{count / length:.2f} {unit}"
    return f"{count / 1e6:.1f} MB"
