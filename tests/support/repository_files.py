"""The project's own files, for the tests that read them."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
CXX = (".cpp", ".h", ".cu", ".cuh")


def files(*folders: str, suffixes: tuple[str, ...]) -> list[str]:
    """Paths of the sources below these folders, relative to the project's root."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in suffixes)


def python_path() -> str:
    """PYTHONPATH of processes that import what tests import: pythonpath in pyproject.toml."""
    here = (TESTS, TESTS / "support", ROOT)
    return os.pathsep.join([*map(str, here), os.environ.get("PYTHONPATH", "")])


def python_blocks(text: str) -> list[str]:
    """The Python code between fences of a page."""
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
