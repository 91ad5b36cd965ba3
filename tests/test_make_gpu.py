"""What `make gpu` runs, with notes taken by a Python that runs nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sources import ROOT, files

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
# Looks things up as the real one does, fails every test, and notes the rest.
STUB = """#!/bin/sh
echo "ran: $*"
[ "$1" != -m ] || exit 5
"""


def make(target: str, folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    stub = folder / "python"
    stub.write_text(f'#!/bin/sh\n[ "$1" != -c ] || exec {python} "$@"\n' + STUB)
    stub.chmod(0o755)
    # The tests may run inside of another make, whose variables would be taken over.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    kept = [f"GPU_JSON={folder}/json", f"GPU_CSV={folder}/csv"]
    return subprocess.run(
        ["make", "-s", target, f"PYTHON={stub}", "PYTEST_ARGS=--last", *kept],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def marked(folders: str) -> set[str]:
    """Files of tests that need a GPU."""
    found = (path for path in files("tests", suffixes=(".py",)) if re.search(folders, path))
    named = (path for path in found if Path(path).name.startswith("test_"))
    return {path for path in named if re.search(r'mark\.gpu|marks\("', (ROOT / path).read_text())}


def test_every_test_that_needs_a_gpu_is_run(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    done = make("gpu-test", tmp_path, sys.executable)
    (line,) = done.stdout.splitlines()
    ran = {word for word in line.split() if word.endswith(".py")}
    assert ran == marked("")
    assert {str(Path(path).parent) for path in ran} == {
        "tests",
        "tests/distributed",
        "tests/trainer",
    }
    assert "-m gpu " in line
    assert line.endswith("--last")


def test_without_the_packages_of_the_others_the_back_ends_are_tested(tmp_path: Path) -> None:
    done = make("gpu-test", tmp_path, f"{sys.executable} -S")
    assert "tests/distributed and tests/trainer are left out, which need torchvision" in done.stderr
    ran = {word for word in done.stdout.split() if word.endswith(".py")}
    assert ran == marked(r"^tests/[^/]*$")


def test_figures_are_reported_though_a_contender_failed(tmp_path: Path) -> None:
    done = make("gpu-bench", tmp_path, sys.executable)
    tests, report = done.stdout.splitlines()
    assert tests == (
        f"ran: -m pytest benchmarks/test_gpu_step.py --benchmark-json {tmp_path}/json --last"
    )
    assert report == f"ran: benchmarks/report.py {tmp_path}/json --csv {tmp_path}/csv"
    assert done.returncode != 0
