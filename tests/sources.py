"""The project's own files, for the tests that read them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CXX = (".cpp", ".h", ".cu", ".cuh")


def files(*folders: str, suffixes: tuple[str, ...]) -> list[str]:
    """Paths of the sources below these folders, relative to the project's root."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in suffixes)
