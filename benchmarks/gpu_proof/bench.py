"""All contenders of one model, through pytest-benchmark; then their table.

``python -m gpu_proof.bench MODEL [ARGUMENTS OF PYTEST]``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import report
from gpu_proof.writing import folder, write_csv, write_text


def measure(out: Path, model: str, arguments: list[str]) -> int:
    """Measure, and write the figures of those that have one though others failed."""
    run = out / f"bench-{model}.run.json"
    options = ["--model", model, "--benchmark-json", str(run), "-q", "-p", "no:cacheprovider"]
    status = int(pytest.main(["benchmarks/test_gpu_step.py", *options, *arguments]))
    if run.exists():
        table = report.rows(json.loads(run.read_text()))
        run.unlink()  # every single time: megabytes
        write_csv(out / f"bench-{model}.csv", table)
        write_text(out / f"bench-{model}.md", report.markdown(table) + "\n")
        print(report.markdown(table))
    # Of 5: -k has left none of this model's.
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status


if __name__ == "__main__":
    raise SystemExit(measure(folder(), sys.argv[1], sys.argv[2:]))
