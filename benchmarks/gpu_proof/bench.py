"""All contenders of one model, through pytest-benchmark; then their table.

``python -m benchmarks.gpu_proof.bench MODEL [ARGUMENTS OF PYTEST]``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_proof.rows import tabulated
from benchmarks.gpu_proof.stages import folder
from benchmarks.results import write_csv, write_text
from benchmarks.step import report


class Rows:
    """A plugin that writes each row as it comes: pytest may be ended before it writes any."""

    def __init__(self, out: Path, name: str) -> None:
        self.out = out
        self.name = name
        self.table: list[dict[str, Any]] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: Any) -> None:
        compared, name = item.funcargs.get("compared"), item.funcargs.get("name")
        if compared is None or name not in compared.figures:
            return
        self.table.append(tabulated(compared, name))
        write_csv(self.out / f"{self.name}.csv", self.table)
        write_text(self.out / f"{self.name}.md", report.markdown(self.table) + "\n")


def measure(out: Path, model: str, arguments: list[str]) -> int:
    """Measure, and write the figures of those that have one though others failed."""
    rows = Rows(out, f"bench-{model}")
    options = ["--model", model, "-q", "-p", "no:cacheprovider", *arguments]
    status = int(pytest.main(["benchmarks/step/test_gpu.py", *options], plugins=[rows]))
    print(report.markdown(rows.table))
    # With -k none of this model's may be left.
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status


if __name__ == "__main__":
    raise SystemExit(measure(folder(), sys.argv[1], sys.argv[2:]))
