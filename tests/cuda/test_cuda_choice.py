"""Which back end CUDA tensors get, and what a user is told. Nothing here needs a GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastlars import _C
from fastlars.backends import choose, cuda
from fastlars.backends.base import Dtypes
from fastlars.backends.cuda import PATHS, Cuda
from repository_files import ROOT

BUILT = _C.build_info()["cuda"]
OLD_DRIVER = "the driver serves CUDA 11.8, and fastlars was built with CUDA 13.0"


@pytest.fixture(autouse=True)
def _nothing_demanded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("FASTLARS_BACKEND", "FASTLARS_CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for cached in (choose._warn_once, cuda.why_not):
        cached.cache_clear()
    yield
    for cached in (choose._warn_once, cuda.why_not):
        cached.cache_clear()


@pytest.fixture
def weight() -> Tensor:
    """A tensor that says it is on a GPU."""
    with FakeTensorMode():
        return torch.empty(3, device="cuda")


def _answers(
    monkeypatch: pytest.MonkeyPatch, *, built: bool = True, cuda_: str = "", triton: str = ""
) -> None:
    info = {**_C.build_info(), "cuda": built, "cuda_reason": "" if built else "nvcc was not found"}
    monkeypatch.setattr(_C, "build_info", lambda: info)
    monkeypatch.setattr(_C, "cuda_why_not", lambda: cuda_, raising=False)
    cuda.why_not.cache_clear()
    monkeypatch.setattr(cuda, "kernel_device_type", lambda: "cuda")
    monkeypatch.setattr(cuda, "device_guard", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(choose, "why_no_triton", lambda device: triton)
    monkeypatch.setattr(choose, "has_float64", lambda device: True)


def _dtypes(weight: Tensor) -> Dtypes:
    return Dtypes(weight.dtype, weight.dtype, torch.float32)


def _chosen(weight: Tensor) -> str:
    return choose.choose(weight, _dtypes(weight)).name


def test_cuda_kernels_serve_where_they_run(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch)
    assert _chosen(weight) == "cuda"
    assert choose.find_compiled(weight, _dtypes(weight)) == ("cuda", {})


def test_kernels_that_cannot_run_leave_triton_and_one_warning(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answers(monkeypatch, cuda_=OLD_DRIVER)
    with pytest.warns(UserWarning, match=f"cuda parameters with Triton.*{OLD_DRIVER}"):
        assert _chosen(weight) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _chosen(weight) == "triton"


def test_kernels_that_were_not_built_are_no_reason_to_warn(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answers(monkeypatch, built=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _chosen(weight) == "triton"
    name, reasons = choose.find_compiled(weight, _dtypes(weight))
    assert (name, reasons) == (
        "triton",
        {"cuda": "fastlars was built without CUDA kernels (nvcc was not found)"},
    )


def test_without_either_the_reference_serves_and_says_why(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answers(monkeypatch, cuda_=OLD_DRIVER, triton="Triton cannot be imported")
    with pytest.warns(UserWarning, match=f"{OLD_DRIVER}; Triton cannot be imported"):
        assert _chosen(weight) == "reference"


def test_types_that_no_kernel_has(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch)
    with pytest.warns(
        UserWarning, match=r"torch operations: compiled .* no torch.float64 weights\."
    ):
        assert _chosen(weight.double()) == "reference"


def test_a_demand_is_met_or_refused(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", "cuda")
    _answers(monkeypatch)
    assert _chosen(weight) == "cuda"
    _answers(monkeypatch, cuda_=OLD_DRIVER)
    with pytest.raises(RuntimeError, match=f"FASTLARS_BACKEND=cuda, but {OLD_DRIVER}"):
        _chosen(weight)
    _answers(monkeypatch, built=False)
    with pytest.raises(RuntimeError, match="but fastlars was built without CUDA kernels"):
        _chosen(weight)
    _answers(monkeypatch)
    with pytest.raises(RuntimeError, match="the cuda back end does not serve cpu"):
        _chosen(torch.ones(3))


def test_a_driver_that_torch_does_not_find_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(device: torch.device) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore of it.")

    _answers(monkeypatch)
    monkeypatch.setattr(cuda, "device_guard", no_driver)
    reason = cuda.why_not(torch.device("cuda", 0))
    assert reason == "Found no NVIDIA driver on your system."


@pytest.mark.parametrize("value", ["", *PATHS])
def test_path(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_CUDA_PATH", value)
    assert Cuda().path == (value or "one-launch")


def test_a_path_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_CUDA_PATH", "three-launch")
    expected = "FASTLARS_CUDA_PATH must be one of one-launch, two-launch, got 'three-launch'"
    with pytest.raises(ValueError, match=expected):
        Cuda()


# `python -m fastlars`.


def _report(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastlars"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_report() -> None:
    done = _report(FASTLARS_CUDA_PATH="one-launch")
    assert done.returncode == 0, done.stderr
    assert "cpu        cpu: " in done.stdout
    assert "override   FASTLARS_CUDA_PATH=one-launch" in done.stdout
    assert f"cuda       {'nvcc' if BUILT else 'not built: '}" in done.stdout
    if torch.cuda.is_available():
        assert "cuda:0     cuda: one-launch path" in done.stdout or not BUILT
    elif BUILT:
        assert "not usable here: cudaError" in done.stdout


def test_report_refuses_a_path_that_is_none() -> None:
    done = _report(FASTLARS_CUDA_PATH="three-launch")
    assert done.returncode == 2
    assert "must be one of one-launch, two-launch, got 'three-launch'" in done.stderr


def test_report_of_a_gpu(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlars.__main__ import why

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setenv("FASTLARS_CHECK", "0")  # which needs a real one
    _answers(monkeypatch)
    assert why("cuda", weight) == "one-launch path; H200"
    _answers(monkeypatch, built=False)
    assert why("triton", weight) == (
        "fastlars was built without CUDA kernels (nvcc was not found); H200"
    )
    monkeypatch.setenv("FASTLARS_BACKEND", "triton")
    assert why("triton", weight) == "FASTLARS_BACKEND asks for it; H200"


@pytest.mark.skipif(not BUILT, reason="the CUDA kernels were not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, and so no error to look at")
def test_without_a_driver_the_extension_says_so() -> None:
    assert cuda.kernel_device_type() == "cpu" or "no NVIDIA" in _C.cuda_why_not()


def test_weights_of_other_devices_never_reach_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernel_device_type", lambda: "cuda")
    with pytest.raises(ValueError, match="the cuda back end needs weights on one cuda device"):
        Cuda().layout([torch.ones(3)])
