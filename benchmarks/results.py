"""Writes what the benchmarks measure: CSV files for the repository, Markdown tables for people."""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Row = Mapping[str, object]


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it, or ends this process, never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
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


def every_column(rows: Sequence[Row]) -> list[str]:
    """The columns of all rows, for rows that do not have the same ones."""
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown(headings: str, align: str, lines: Iterable[str | Iterable[object]]) -> str:
    """A Markdown table.

    Args:
        headings: of the columns, with " | " between two.
        align: "l" or "r" for each column; the last letter serves all further columns.
        lines: the cells of each line, or their text with " | " between two.
    """
    sides = align.ljust(headings.count("|") + 1, align[-1])
    rule = "|".join("--:" if side == "r" else "---" for side in sides)
    texts = (line if isinstance(line, str) else " | ".join(map(str, line)) for line in lines)
    return "\n".join([f"| {headings} |", f"|{rule}|", *(f"| {text} |" for text in texts)])


def plain_table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, with their own columns."""
    columns = every_column(rows)
    lines = ([row.get(name, "") for name in columns] for row in rows)
    return markdown(" | ".join(columns), "l", lines) + "\n"


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks that are timed in rounds."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--csv", type=Path, help="write the rows here")
    made.add_argument("--rounds", type=int, default=rounds)
    return made


def publish(table: str, rows: Sequence[Row], path: Path | None) -> None:
    """Print the table for people, and write the rows where `path` is given."""
    print(table)
    if path:
        write_csv(path, rows)
