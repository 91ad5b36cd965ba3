"""The tests of one xdist_group run in one worker, which makes what they share once."""

from __future__ import annotations

from pathlib import Path

import pytest

from subprocess_tests import python

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
    workers = ("-n", "2", "--dist", "loadgroup")
    printed = python("-m", "pytest", "-p", "no:cacheprovider", *workers, str(test)).stdout
    assert "6 passed" in printed, printed
    assert len(list(tmp_path.glob("gw*"))) == 1, "xdist_group has no effect"
