"""What stages write, whole or not at all: a stage may be ended at any time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FOLDER = "FASTLARS_GPU_FOLDER"  # where a stage writes


def folder() -> Path:
    """Where this stage writes."""
    return Path(os.environ[FOLDER])


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by the rows, with the columns of all of them."""
    # Only stages have fastlars, not the driver: nothing is built yet where it starts.
    from fastlars.trainer.output import atomic

    columns = _columns(rows)
    atomic.write_table([columns, *([row.get(name) for name in columns] for row in rows)], path)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
