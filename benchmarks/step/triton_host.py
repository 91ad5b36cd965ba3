"""Host time of a step with Triton's and with CUDA's kernels, without a GPU: nothing is launched.

``python -m benchmarks.step.triton_host [ROUNDS]``

Triton compiles its kernels for sm_90, and a driver takes their launches and does nothing; the
extension's functions that launch CUDA kernels are replaced by one that does nothing. What is timed
is the work of Python, torch, fastlars and Triton up to there, for tensors of 16 elements, on one
thread; in turns, so that all are disturbed alike. Prints medians over the rounds of medians over 50
steps, in microseconds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from itertools import count, product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastlars
from benchmarks import results
from benchmarks.step.host_turns import BLOCK, median_us, parameters
from fastlars import _C
from fastlars.backends import choose, cuda

# Triton keeps kernels by device: not those of one that is there.
DEVICES = count(100)
COUNTS = (161, 1000)


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


def launch_nothing() -> NoLaunches:
    """Let both back ends step CPU tensors; returns Triton's driver."""
    os.environ["FASTLARS_CHECK"] = "0"
    choose.why_no_triton = lambda device: ""  # type: ignore[assignment]
    cuda.why_not = lambda device: ""  # type: ignore[assignment]
    cuda.kernel_device_type = lambda: "cpu"
    _C.cuda_step = lambda *arguments: None  # type: ignore[assignment]
    notes = NoLaunches()
    driver.set_active(notes)
    return notes


def optimizers(count: int) -> dict[str, Any]:
    """By name, after a first step, which plans."""
    made: dict[str, Any] = {}
    backends = ["triton", *(["cuda"] if _C.build_info()["cuda"] else [])]
    for rule, backend in product((fastlars.LARS, fastlars.LAMB), backends):
        os.environ["FASTLARS_BACKEND"] = backend
        optimizer = made[f"{rule.__name__}, {backend}"] = rule(parameters(count), lr=1e-6)
        optimizer.step()
    made["torch's SGD, fused"] = torch.optim.SGD(
        parameters(count), lr=1e-6, momentum=0.9, fused=True
    )
    return {f"{name}, {count} tensors": optimizer for name, optimizer in made.items()}


def main(rounds: str = "40") -> int:
    """Print a table."""
    torch.set_num_threads(1)
    notes = launch_nothing()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        made = {name: each for count in COUNTS for name, each in optimizers(count).items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    launches = {}
    for _, (name, optimizer) in product(range(int(rounds)), made.items()):
        before = len(notes.launched)
        times[name].append(median_us(optimizer))
        launches[name] = (len(notes.launched) - before) // BLOCK
    lines = [
        [name, f"{statistics.median(each):.0f}", launches[name] or ""]
        for name, each in times.items()
    ]
    print(results.markdown("step | us | launches of Triton", "lr", lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
