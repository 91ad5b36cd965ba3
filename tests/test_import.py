"""``import fastlars``: what it shows, and what it says where there is no extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from sources import ROOT


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A new interpreter in a folder. -S: an editable install's finder would lend its extension."""
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_sources_without_extension_say_so(tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastlars", tmp_path / "fastlars", ignore=skip)
    done = run("import fastlars", tmp_path)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"ImportError: {tmp_path / 'fastlars'} holds the sources of fastlars")
    assert "No module named" not in done.stderr


def test_modules_that_are_imported_on_demand_are_listed() -> None:
    code = "import sys, fastlars; print('fastlars.migrate' in sys.modules, *dir(fastlars))"
    done = run(code, ROOT)
    imported, *names = done.stdout.split()
    assert imported == "False", done.stderr
    assert {"LARS", "conventions", "distributed", "migrate"} <= set(names)
