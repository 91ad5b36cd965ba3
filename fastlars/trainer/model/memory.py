"""The memory that a process needs, and the memory of the machine: no model is run."""

from __future__ import annotations

import os
import platform
import sys
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
_REFUSED = 1.3  # times the machine's memory; from 1 on there is a warning
_OWN_CGROUPS, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_TWO_STATES = ("lamb", "akiba")  # recipes with two tensors of state for each parameter


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
    found: dict[str, float] = {}
    if context.world.device.type == "cpu":
        there = weights + (data.kept_bytes if data.prepared else 0)
        found["Python and its packages"] = max(_resident() - there, 0)
    found |= {
        "weights": weights,
        "gradients": gradients,
        "optimizer states": gradients * (2 if config.recipe in _TWO_STATES else 1),
    }
    if context.world.size > 1:
        found["buckets of gradients"] = gradients
    if config.ema:
        found["moving average"] = weights
    if data.kept_bytes:
        found["kept images"] = data.kept_bytes
    # Half precision keeps a copy of the images; otherwise they are part of the activations.
    found["images of a batch"] = pixels * (5 if _half(context) else 1)
    found["activations"] = fixed + for_each * share
    return found | {"workspaces": _SPARE * sum(found.values())}


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
    what = (
        f"{'this run needs' if here == 1 else f'{here} processes need'} about {size(total)} of "
        f"memory, of which {largest} {size(here * need[largest])}"
    )
    where = "this machine" if world.device.type == "cpu" else "the GPU"
    text = ""
    with world.raise_on_all_ranks():
        if total > _REFUSED * whole:
            raise TrainerError(
                f"{what}, and {where} has {size(whole)}: {_remedy(context, largest)}"
            )
        if total > free:
            text = f"{what}, and {where} has {size(free)} free: {_remedy(context, largest)}"
    return text


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
    half, side = _half(context), context.data.image_size

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        kind = torch.half if half and tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=kind)

    state = {name: meta(buffer) for name, buffer in context.model.named_buffers()}
    for name, parameter in context.model.named_parameters():
        state[name] = meta(parameter).requires_grad_(parameter.requires_grad)
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


def _half(context: TrainingContext) -> bool:
    return context.precision.name != "fp32"


def available(device: torch.device) -> tuple[float, float]:
    """Bytes of the device's memory, and how many of them this process could have now.

    On the CPU, swap counts, and so do the limits of a container or a batch system (cgroups).
    """
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return whole, free + torch.cuda.memory_reserved(device)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = _numbers(Path("/proc/meminfo"))
    whole += 1024 * meminfo.get("SwapTotal:", 0)
    free = whole
    if "MemAvailable:" in meminfo:
        free = 1024 * (meminfo["MemAvailable:"] + meminfo.get("SwapFree:", 0))
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
        root = _CGROUPS / controllers
        limit, use, cached = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        for relative in [Path(name.lstrip("/")), *Path(name.lstrip("/")).parents]:
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
    """Resident bytes of this process; its peak, where the system does not report the present."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return pages * os.sysconf("SC_PAGE_SIZE")


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def size(count: float) -> str:
    """A number of bytes in MB, GB or TB."""
    for unit, length in (("TB", 1e12), ("GB", 1e9)):
        if count >= length:
            return f"{count / length:.2f} {unit}"
    return f"{count / 1e6:.1f} MB"
