"""Writes what the benchmarks measure: CSV files for the repository, Markdown tables for people."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it, or ends this process, never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_csv(
    path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None
) -> None:
    """Replace a CSV file by one with these rows.

    Args:
        path: the file; its folder is made where it is missing.
        rows: their values by column.
        columns: of the file; a row may lack some. Without it, all rows must have the same ones.

    Raises:
        ValueError: a row has a column that the file has not, or lacks one of the first row's.
    """
    names = list(columns or rows[0])
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if columns is None and (missing := set(names) - row.keys()):
            raise ValueError(f"{path.name}: a row lacks {', '.join(sorted(missing))}")
        writer.writerow(row)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def every_column(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The columns of all rows, for rows that do not have the same ones."""
    return list(dict.fromkeys(name for row in rows for name in row))


def plain_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as Markdown, with their own columns."""
    columns = every_column(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
