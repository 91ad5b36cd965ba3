"""Triton's launches as its runtime takes them, with a driver that launches nothing.

The interpreter lets pass what the runtime refuses, and compiles nothing. Needs no GPU.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from backend_cases import BF16, F32, PLAIN, ROWS, Kinds, Run
from fastlars.backends.base import OnDevice, Scalars
from fastlars.rules import GradientNorm
from problems import ORDINARY

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

NAMES = (
    "LARS momentum correction",
    "LAMB of the paper",
    "LAMB without adaptation",
    "RMSprop warm-up across the transition",
)
RATES, SEEDS = (0.1, 1.0, 16.0), (3, 2**61 + 16, 1)
# Triton keeps kernels by device: not those of one that is there.
DEVICES = count(100)


class Notes:
    """A driver: kernels are compiled for sm_90, loaded once each, and what is launched is noted."""

    def __init__(self) -> None:
        self.utils = self
        self.device = next(DEVICES)
        self.loaded: list[str] = []
        self.launched: list[str] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(metadata.name)

    def load_binary(self, name: str, *arguments: Any) -> tuple[int, ...]:
        self.loaded.append(name)
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = Notes()
    monkeypatch.setattr(driver, "_active", found)
    return found


def _on_device(rate: float, seed: int | None) -> Scalars:
    return Scalars(0.0, 1.0, seed, OnDevice(torch.tensor(rate, dtype=torch.float64)))


@pytest.mark.parametrize("kinds", [PLAIN, Kinds(BF16, F32, F32)], ids=["plain", "stochastic"])
@pytest.mark.parametrize("name", NAMES)
def test_rates_and_seeds_compile_nothing_anew(name: str, kinds: Kinds, notes: Notes) -> None:
    (row,) = (row for row in ROWS if row.name == name)
    run = Run("triton", row, kinds, ORDINARY)
    run.take_gradients(0)
    seeds = SEEDS if kinds.weight == BF16 else (None,) * 3
    pairs = list(zip(RATES, seeds, strict=True))
    for numbers in (
        [Scalars(rate, 1.0, seed) for rate, seed in pairs],
        [_on_device(rate, seed) for rate, seed in pairs],
    ):
        loaded, launched = [], []
        for now in numbers:
            before = len(notes.loaded), len(notes.launched)
            bound = run.bind()
            run.backend.measure(GradientNorm(), bound, now)
            run.backend.step(row.rule, bound, now)
            loaded.append(len(notes.loaded) - before[0])
            launched.append(len(notes.launched) - before[1])
        assert loaded[0] > 0
        assert loaded[1:] == [0, 0]
        assert launched[0] > 3 - (not row.rule.adapt)
        assert len(set(launched)) == 1
