"""What CUDA answers to a launch reaches Python, with the kernel's name and what to do about it.

The device that runs kernels on the CPU gives any answer that it is told to; so these tests run in
the process that test_cuda_on_cpu.py starts, and there alone.
"""

from __future__ import annotations

import pytest

from backend_cases import DEFAULTS, PLAIN, Run
from device_cases import EMULATED, assert_same_runs
from fastlars import _C
from fastlars.backends.cuda import Cuda
from problems import ORDINARY

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs a device that fails on demand")
ANSWER = "FASTLARS_EMULATED_ERROR"


def _run(path: str) -> Run:
    run = Run("cuda", DEFAULTS[2], PLAIN, ORDINARY)
    run.backend = Cuda()
    run.backend.path = path
    run.take_gradients(0)
    return run


@pytest.mark.parametrize(("path", "kernel"), [("two-launch", "measure"), ("one-launch", "step")])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (2, "cudaErrorMemoryAllocation.*; the GPU has no memory left"),
        (35, "cudaErrorInsufficientDriver.*; .*update the driver"),
        (98, "cudaErrorInvalidDeviceFunction.*; .*FASTLARS_CUDA_ARCHS"),
        (209, "cudaErrorNoKernelImageForDevice.*; .*FASTLARS_CUDA_ARCHS"),
        (700, "cudaErrorIllegalAddress.*; .*CUDA_LAUNCH_BLOCKING=1"),
        (1, "cudaErrorInvalidValue"),
    ],
)
def test_errors_name_the_kernel_and_the_cure(
    answer: int, words: str, path: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, expected = _run(path), _run(path)
    bound = run.bind()
    before = [x.clone() for _, x in run.written()]
    monkeypatch.setenv(ANSWER, str(answer))
    with pytest.raises(_C.CudaError, match=f"^fastlars kernel {kernel}: {words}") as caught:
        run.backend.step(run.row.rule, bound, run.row.now(0))
    assert isinstance(caught.value, RuntimeError)
    monkeypatch.delenv(ANSWER)
    for (_, x), was in zip(run.written(), before, strict=True):
        assert x.equal(was)
    # The device is as usable as before.
    run.backend.step(run.row.rule, bound, run.row.now(0))
    expected.step(0)
    assert_same_runs("after an error", run, expected)


def test_apply_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run("two-launch")
    bound, now = run.bind(), run.row.now(0)
    sums = run.backend.measure(run.row.rule, bound, now)
    monkeypatch.setenv(ANSWER, "1")
    with pytest.raises(_C.CudaError, match=r"^fastlars kernel apply: cudaErrorInvalidValue"):
        run.backend.apply(run.row.rule, bound, now, sums)
