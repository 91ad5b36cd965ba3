"""Stops a release whose tag, version and changelog do not agree: python .ci/version.py v0.1.0"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problem(tag: str) -> str | None:
    """What a tag has against being released."""
    (version,) = re.findall(
        r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    if tag != f"v{version}":
        return f"the tag {tag} does not name the version of pyproject.toml, {version}"
    changes = (ROOT / "CHANGELOG.md").read_text()
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.MULTILINE):
        return f"CHANGELOG.md has no section '## {version} (YYYY-MM-DD)'"
    return None


if __name__ == "__main__":
    sys.exit(problem(sys.argv[1]))
