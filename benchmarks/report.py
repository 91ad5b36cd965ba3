"""From pytest-benchmark's JSON to one CSV for the repository and one table for people.

``python benchmarks/report.py RUN.json [RUN.json ...] [--csv OUT.csv]``
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = [
    "group",
    "contender",
    "version",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "rounds",
    "kernel_ms",
    "fastlars_over_this",
    "bytes_per_parameter",
    "gb_s",
    "memory_gb_s",
    "share_of_memory",
    "parameters",
    "threads",
    "machine",
    "torch",
    "python",
    "date",
    "commit",
]


def rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a benchmark, with the machine it ran on."""
    machine = run["machine_info"]
    common = {
        "machine": f"{machine['cpu'].get('brand_raw', machine['machine'])}, "
        f"{machine['cpu'].get('count', '?')} cores",
        "torch": machine.get("torch", ""),
        "python": machine["python_version"],
        "date": run["datetime"][:10],
        "commit": run["commit_info"]["id"][:12],
    }
    out = []
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        if "contender" in info:
            row = {"group": benchmark["group"], **info, **common}
            out.append({name: _short(row.get(name, "")) for name in COLUMNS})
    return out


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def markdown(table: list[dict[str, Any]]) -> str:
    """The table that `make bench` prints."""
    lines = [
        "| case | optimizer | median ms | 20% .. 80% | kernel ms | fastlars / this | GB/s "
        "| of memory |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in table:
        spread = f"{row['p20_ms']} .. {row['p80_ms']}"
        share = f"{float(row['share_of_memory']):.0%}" if row["share_of_memory"] else ""
        lines.append(
            f"| {row['group']} | {row['contender']} {row['version']} | {row['p50_ms']} | {spread} "
            f"| {row['kernel_ms']} | {row['fastlars_over_this']} | {row['gb_s']} | {share} |"
        )
    if table:
        first = table[-1]
        lines.append("")
        lines.append(
            f"{first['machine']}, {first['threads']} threads, torch {first['torch']}, Python "
            f"{first['python']}, {first['date']}, commit {first['commit']}; memory: "
            f"{first['memory_gb_s']} GB/s"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; write the CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="what pytest --benchmark-json wrote")
    parser.add_argument("--csv", type=Path, help="write the rows here too")
    arguments = parser.parse_args(argv)
    table = []
    for run in arguments.runs:
        try:
            table += rows(json.loads(run.read_text()))
        except (OSError, ValueError, KeyError) as error:
            print(f"{run}: not a pytest-benchmark run: {error!r}", file=sys.stderr)
            return 2
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(table)
    print(markdown(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
