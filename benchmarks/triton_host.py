"""Host time of a step on Triton and on CUDA's path, without a GPU: nothing is launched.

``python benchmarks/triton_host.py [ROUNDS]``. Kernels are compiled for sm_90, and a driver takes
their launches and does nothing, so that what is timed is the work of Python, torch, fastlars and
Triton up to the driver. CUDA's path needs its own extension, and is timed by host_turns.py. Prints
medians over steps, in microseconds, for tensors of 16 elements.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from itertools import count
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Triton keeps kernels by device: not those of one that is there.
DEVICES = count(100)
COUNTS, BLOCK = (161, 1000), 50


class NoLaunches:
    """A driver: kernels are compiled for sm_90, loaded once each, and what is launched is noted."""

    def __init__(self) -> None:
        self.utils = self
        self.device = next(DEVICES)
        self.sources: list[Any] = []
        self.loaded: list[str] = []
        self.launched: list[str] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.sources.append(source)
        return lambda *arguments: self.launched.append(metadata.name)

    def load_binary(self, name: str, *arguments: Any) -> tuple[int, ...]:
        self.loaded.append(name)
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def main(rounds: str = "40") -> int:
    """Print a table."""
    os.environ |= {"FASTLARS_BACKEND": "triton", "FASTLARS_CHECK": "0"}
    import fastlars
    from fastlars.backends import choose

    choose.why_no_triton = lambda device: ""  # type: ignore[assignment]
    torch.set_num_threads(1)
    made: dict[str, Any] = {}
    for size in COUNTS:
        for kind, options in (
            (fastlars.LARS, {}),
            (fastlars.LARS, {"momentum_correction": True}),
            (fastlars.LAMB, {}),
        ):
            params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(size)]
            for p in params:
                p.grad = torch.randn(4, 4)
            name = " ".join([kind.__name__, *options])
            made[f"{name}, {size} tensors"] = kind(params, lr=1e-6, **options)
    fused = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(COUNTS[0])]
    for p in fused:
        p.grad = torch.randn(4, 4)
    made[f"torch SGD fused, {COUNTS[0]} tensors"] = torch.optim.SGD(
        fused, lr=1e-6, momentum=0.9, fused=True
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        notes = NoLaunches()
        driver._active = notes  # type: ignore[attr-defined]
        times: dict[str, list[float]] = {name: [] for name in made}
        launches = {}
        for optimizer in made.values():
            optimizer.step()
        for _ in range(int(rounds)):
            for name, optimizer in made.items():
                seconds = []
                before = len(notes.launched)
                for _ in range(BLOCK):
                    start = time.perf_counter()
                    optimizer.step()
                    seconds.append(time.perf_counter() - start)
                launches[name] = (len(notes.launched) - before) / BLOCK
                times[name].append(statistics.median(seconds) * 1e6)
    print("| step | us | launches |\n|---|--:|--:|")
    for name, each in times.items():
        print(f"| {name} | {statistics.median(each):.1f} | {launches[name]:g} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
