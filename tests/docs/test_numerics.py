"""docs/numerics.md: its lines run, and its equations and constants are those of the sources."""

from __future__ import annotations

from typing import Any

import pytest

from fastlars.conventions import by_name
from optimizers import one_thread as one_thread
from repository_files import ROOT, python_blocks
from tolerances import TOLERANCES

TEXT = (ROOT / "docs" / "numerics.md").read_text()


def test_equations_are_those_of_the_conventions() -> None:
    block = TEXT[TEXT.index("## Conventions") :].split("```")[1]
    lines = block.strip().splitlines()[1:]
    assert dict(line.split(maxsplit=1) for line in lines) == {
        name: convention.equation for name, convention in by_name.items()
    }


def test_lines_have_the_bits_of_the_cpu_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLARS_BACKEND", raising=False)
    blocks = python_blocks(TEXT)
    assert len(blocks) == 1
    assert "torch.equal" in blocks[0]
    namespace: dict[str, Any] = {}
    exec(blocks[0], namespace)


@pytest.mark.parametrize(
    ("path", "source", "page"),
    [
        ("csrc/cpu/chunk.h", "kChunk = 16384;", "CPU: 16,384 elements"),
        ("csrc/cuda/chunk_table.h", "kChunkElements = 4096;", "CUDA and Triton: 4,096"),
        (
            "fastlars/backends/triton/memory.py",
            "BLOCK = tl.constexpr(4096)",
            "CUDA and Triton: 4,096",
        ),
        ("csrc/rules/common.h", "sum > 1e-25 && sum < 1e37", "below 1e-25 or above 1e37"),
        ("csrc/core/random.h", "Philox4x32-10", "Philox4x32-10"),
    ],
)
def test_constants_are_those_of_the_sources(path: str, source: str, page: str) -> None:
    assert source in (ROOT / path).read_text()
    assert page in TEXT


def test_tolerance_of_sums_is_the_tested_one() -> None:
    assert TOLERANCES["sum"].arithmetic == 2e-6
    assert "to 2e-6 of its value" in TEXT
