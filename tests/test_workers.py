"""The tests of one xdist_group run in one worker, which makes what they share once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MARKED = """
import os, pathlib, pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(6))
def test(number):
    pathlib.Path(__file__).with_name(os.environ["PYTEST_XDIST_WORKER"]).touch()
"""


def test_a_group_stays_on_one_worker(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    test = tmp_path / "test_marked.py"
    test.write_text(MARKED)
    command = (sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", str(test))
    ours = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True, text=True)
    assert "6 passed" in done.stdout, done.stdout + done.stderr
    assert len(list(tmp_path.glob("gw*"))) == 1, "xdist_group has no effect"
