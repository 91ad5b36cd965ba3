"""A device without float64, such as Intel's Arc A, is stepped with plain torch operations."""

from __future__ import annotations

import pytest
import torch

from backends.no_float64_processes import step_shards
from distributed.processes import run
from fastlars.backends.float64 import has_float64, to_widest, widest
from subprocess_tests import passing
from tolerances import assert_close


@pytest.mark.parametrize("holds", ["0", "1"])
def test_steps_on_such_a_device(holds: str) -> None:
    assert passing("backends/no_float64_cases.py", FASTLARS_TEST_HOLDS_FLOAT64=holds) == 37


def test_shards_and_norms_over_processes_on_such_a_device() -> None:
    for found in run(2, step_shards):
        for i, (value, right) in enumerate(found):
            assert_close(f"value {i}", "weight", value, right, float(right.abs().max()))


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_other_devices_have_it(kind: str) -> None:
    device = torch.device(kind)
    assert has_float64(device)
    assert widest(device) == torch.float64
    sums = torch.ones(2, dtype=torch.float64)
    assert to_widest(sums, torch.device("cpu")) is sums
