"""The machine of a measurement: its name for the tables; a device's clock, caches and memory."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from datetime import date
from functools import cached_property
from typing import Any, Protocol

import torch

from benchmarks import driver

# Of the buffer whose copy is timed: far above any cache.
COPY_BYTES = 2**30


def describe() -> dict[str, str]:
    """Processor, cores and torch of this machine, and today's date: columns of every table."""
    import cpuinfo  # comes with pytest-benchmark; timing a GPU's work does not need it

    brand = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    facts = {"machine": f"{brand}, {os.cpu_count()} cores", "torch": torch.__version__}
    return facts | {"date": date.today().isoformat()}


def describe_run(device: torch.device) -> dict[str, str | int]:
    """The machine, and what of it a training loop used."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {**describe(), "device": name, "threads": torch.get_num_threads()}


def free_bytes() -> int:
    """Memory that can be had without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024


class Mark(Protocol):
    """A moment in the device's queue."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to ``end``."""
        ...


class Machine(Protocol):
    """What the benchmarks need of a device. :class:`Gpu` is one; tests make another."""

    device: torch.device

    def mark(self) -> Mark:
        """Note the time at which the device has done what it was given so far."""
        ...

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        ...

    def flush(self, seconds: float) -> None:
        """Empty the caches, and keep the device busy for at least so long."""
        ...

    def free_bytes(self) -> int:
        """Memory that can be had."""
        ...

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Memory that a call takes beyond what is in use before it."""
        ...

    def recorded(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a graph to be replayed."""
        ...

    def facts(self) -> dict[str, str]:
        """What belongs beside every number."""
        ...


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        floats = 2 * self._properties.L2_cache_size // 4
        self._scratch = torch.zeros(floats, device=self.device)
        self._largest = torch.zeros((), device=self.device)

    @property
    def multiprocessors(self) -> int:
        """Multiprocessors of the device."""
        return self._properties.multi_processor_count

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block can have."""
        return self._properties.shared_memory_per_block_optin

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def flush(self, seconds: float) -> None:
        for _ in range(1 + math.ceil(seconds / self._pass_s)):
            self._scratch.zero_()
        # Reading leaves a cache without lines that the step would have to write back first.
        torch.amax(self._scratch, dim=0, out=self._largest)

    @cached_property
    def _pass_s(self) -> float:
        """Seconds of one write of the scratch buffer."""
        passes = 20
        self._scratch.zero_()
        start = self.mark()
        for _ in range(passes):
            self._scratch.zero_()
        end = self.mark()
        self.wait()
        return start.elapsed_time(end) * 1e-3 / passes

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def extra_bytes(self, call: Callable[[], object]) -> int:
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def recorded(self, call: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def facts(self) -> dict[str, str]:
        return {
            "gpu": f"{self._properties.name}, {self.multiprocessors} SMs, "
            f"{self._properties.L2_cache_size / 2**20:.0f} MB L2",
            "driver": driver.version(),
            "cuda": str(torch.version.cuda),
        }
