"""The CUDA back end beside torch on a GPU: streams, graphs, profiler, sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

import fastlars
from device_cases import NEEDS_KERNELS, optimizer, set_gradients
from device_streams import SHAPES, Streams, each_optimizer
from fastlars.backends.choose import instance
from fastlars.backends.cuda import PATHS
from repository_files import python_path

pytestmark = [pytest.mark.gpu, NEEDS_KERNELS]
KERNELS = {"two-launch": ("measure", "apply"), "one-launch": ("step",)}
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)

# A process that has launched nothing yet.
FIRST_LAUNCH = """
import torch
from backend_cases import PLAIN, USUAL
from device_cases import SIZES, Twin, assert_same_runs

for row in USUAL:
    eager, recorded = (Twin("cuda", row, PLAIN, SIZES) for _ in range(2))
    for run in (eager, recorded):
        run.take_gradients(0)
    graph = torch.cuda.CUDAGraph()
    bound = recorded.bind() if {planned} else None
    with torch.cuda.graph(graph):
        recorded.backend.step(row.rule, bound or recorded.bind(), row.now(0))
    graph.replay()
    eager.step(0)
    assert_same_runs(row.name, recorded, eager)
"""
# Whole chunks, ragged ones, tensors off every boundary, all types; both paths.
SANITIZED = """
import torch
from backend_cases import BF16, DEFAULTS, F16, F32, PLAIN, Dtypes
from device_cases import LAYOUTS, SIZES, Twin
from fastlars.backends.cuda import PATHS

for row in DEFAULTS:
    for dtypes in (PLAIN, Dtypes(F32, BF16, BF16, copy=F16)):
        for problem in (SIZES, LAYOUTS):
            for path in PATHS:
                twin = Twin("cuda", row, dtypes, problem)
                twin.backend.path = path
                for step in range(2):
                    twin.take_gradients(step)
                    twin.step(step)
torch.cuda.synchronize()
print("stepped")
"""


@pytest.fixture(autouse=True, params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(instance("cuda"), "path", request.param)
    return request.param


class TestStreams(Streams):
    backend = "cuda"


def _run(code: str, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": python_path(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("planned", [True, False], ids=["planned before", "planned in it"])
def test_first_launch_in_a_recording(planned: bool, path: str) -> None:
    done = _run(FIRST_LAUNCH.format(planned=planned), FASTLARS_CUDA_PATH=path)
    assert done.returncode == 0, done.stdout[-4000:]


@each_optimizer
def test_profiler_lists_our_kernels(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", "cuda")
    params, tested = optimizer(name, "cuda", SHAPES)
    set_gradients(params, 0)
    tested.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        tested.step()
        torch.cuda.synchronize()
    ours = {event.key: event.count for event in profile.key_averages() if "fastlars" in event.key}
    expected = KERNELS[path] if getattr(fastlars, name).rule.sums else ("apply",)
    assert sum(ours.values()) == len(expected), ours
    for kernel in expected:
        assert any(f"::{kernel}<" in key for key in ours), ours


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, path: str) -> None:
    if path != PATHS[0]:
        pytest.skip("one process checks both paths")
    if SANITIZER is None:
        pytest.skip("compute-sanitizer was found neither in PATH nor in /usr/local/cuda/bin")
    options = ("--tool", tool, "--kernel-name", "kns=fastlars", "--report-api-errors", "no")
    # torch's cache would hide what lies beyond a tensor.
    done = _run(
        SANITIZED, SANITIZER, *options, "--error-exitcode", "9", PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert "stepped" in done.stdout, done.stdout[-4000:]
    assert done.returncode == 0, done.stdout[-4000:]
