"""The list of planted faults does not rot: each has one place in today's sources, none is lost."""

from __future__ import annotations

import ast

import pytest

from planted_faults import FAULTS, Fault
from repository_files import ROOT

KINDS = {
    "cpu": "csrc/cpu/",
    "cuda": "csrc/cuda/",
    "triton": "fastlars/backends/triton/",
    "trust": "csrc/rules/common.h",
    "layout": "csrc/layout.h",
    "state dict": "fastlars/optim/checkpoint.py",
    "conventions": "fastlars/conventions.py",
    "overlap": "fastlars/distributed/",
    "sharded": "fastlars/optim/dtensor.py",
    "recipe": "fastlars/trainer/",
    "checkpoint": "fastlars/trainer/",
    "images": "fastlars/trainer/",
}


def test_every_kind_of_code_has_a_fault() -> None:
    assert list(FAULTS) == list(KINDS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_one_place(name: str) -> None:
    fault = FAULTS[name]
    assert fault.file.startswith(KINDS[name])
    text = fault.planted(ROOT)
    assert text != (ROOT / fault.file).read_text()
    if fault.file.endswith(".py"):
        ast.parse(text)


@pytest.mark.parametrize(("old", "count"), [("no such line", 0), ("fastlars", r"\d\d")])
def test_any_other_number_of_places_is_an_error(old: str, count: object) -> None:
    with pytest.raises(ValueError, match=f"conventions.py has {count} times '{old}'"):
        Fault("", "fastlars/conventions.py", old, "").planted(ROOT)
