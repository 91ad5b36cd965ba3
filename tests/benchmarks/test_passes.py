"""benchmarks.step.passes without a stopwatch: bytes, rates, rows; wrong passes have no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import RESULTS
from benchmarks.results import read_csv
from benchmarks.step import passes
from benchmarks.step.traffic import FLOAT32, elements
from fastlars.backends.base import StepScalars
from fastlars.backends.cpu import Cpu
from repository_files import ROOT


def test_rows_have_the_rates_of_their_times(tmp_path: Path) -> None:
    out = tmp_path / "passes.csv"
    assert passes.main(["--sizes", "4e4,7", "--rounds", "5", "--csv", str(out)]) == 0
    table = read_csv(out)
    assert [row["elements"] for row in table] == ["40000"] * 12 + ["7"] * 12
    for row in table:
        assert all(row.values())
        assert row["threads"] == "2"
        read, written = int(row["read_bytes"]), int(row["written_bytes"])
        each = int(row["elements"]) / float(row["p50_ms"]) / 1e6
        assert float(row["read_gb_s"]) == pytest.approx(read * each, rel=0.01)
        assert float(row["moved_gb_s"]) == pytest.approx((read + written) * each, rel=0.01)


@pytest.mark.parametrize("name", passes.RULE)
def test_bytes_are_those_of_the_rules(name: str) -> None:
    found = passes.passes(name, 7)
    assert list(found) == ["measure", "apply", "step", passes.TORCH[name]]
    bytes_of = {which: (each.read, each.written) for which, each in found.items()}
    both = zip(bytes_of["measure"], bytes_of["apply"], strict=True)
    assert bytes_of["step"] == tuple(map(sum, both))
    # A step asks for what two launches ask for; torch's, for every array once.
    moved = elements(name, "two-launch", FLOAT32)
    assert sum(bytes_of["step"]) == moved.touched
    assert sum(bytes_of[passes.TORCH[name]]) == moved.least


@pytest.mark.parametrize("name", passes.RULE)
def test_wrong_passes_have_no_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes.check(name)
    right = Cpu.apply

    def doubled(
        self: Cpu, rule: Any, bound: Any, now: StepScalars, sums: torch.Tensor
    ) -> torch.Tensor:
        return right(self, rule, bound, StepScalars(2.0 * now.lr), sums)

    monkeypatch.setattr(Cpu, "apply", doubled)
    with pytest.raises(AssertionError, match="off by"):
        passes.check(name)


def test_committed_figures_are_those_of_the_documentation() -> None:
    table = read_csv(RESULTS / "passes.csv")
    written = {(r["what"], r["pass"]): r for r in passes.measure(7, rounds=5)}
    assert {(row["what"], row["pass"]) for row in table} == written.keys()
    page = (ROOT / "docs" / "performance.md").read_text()
    section = page[page.index("### What a step costs on a CPU") :].split("\n\n")[2]
    documented = [line.strip("| ").split(" | ")[2:] for line in section.splitlines()[2:]]
    columns = ("p50_ms", "read_bytes", "written_bytes", "read_gb_s", "moved_gb_s")
    largest = max(int(row["elements"]) for row in table)
    assert documented == [
        [row[name] for name in columns] for row in table if int(row["elements"]) == largest
    ]
    for row in table:
        expected = written[row["what"], row["pass"]]
        for name in ("read_bytes", "written_bytes"):
            assert row[name] == str(expected[name])
