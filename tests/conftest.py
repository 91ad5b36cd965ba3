"""What every test starts from: seeds, two threads, and a reason where a GPU is missing."""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterable
from importlib.util import find_spec
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: a thread that spins while it waits would slow down the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

import cuda_emulation
import interpreted

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreted.prepare_once()
if cuda_emulation.VARIABLE in os.environ:
    # Before anything imports fastlars: its kernels for GPUs are then run on the CPU.
    cuda_emulation.load()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked gpu where there is no CUDA device."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device, and torch {torch.__version__} sees none here")


class WithoutTorchvision(pytest.Module):
    """A file of tests, skipped if it needs torchvision, which not every torch has."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        if self.path.parent.name != "trainer":  # whose fixtures train
            try:
                return super().collect()
            except self.CollectError as error:
                if "No module named 'torchvision" not in str(error):
                    raise
        pytest.skip("needs torchvision, which is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Takes over where torchvision is missing; pytest's own modules serve elsewhere."""
    if find_spec("torchvision") is not None:
        return None
    return WithoutTorchvision.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Likewise for a single test that comes to import it."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if find_spec("torchvision") is not None or "'torchvision" not in str(error):
            raise
        pytest.skip("needs torchvision, which is not installed")


@pytest.fixture
def marks(request: pytest.FixtureRequest) -> str:
    """The -m for tests that a test runs in a process of its own: that of `make test`, or none."""
    return "not slow" if request.config.getoption("markexpr") == "not slow" else ""


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Every test starts from the same random state, and with threads to get wrong."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(2)
